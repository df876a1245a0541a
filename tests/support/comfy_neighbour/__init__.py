"""A custom-node pack for tests only: a bad neighbour, whose acts are chosen by a node.

"before" acts when its node runs, in ComfyUI's worker; "preview" acts whenever a picture of the
unfinished latents is made, which packs that animate previews do by the same replacement.
"""

import gc
import signal
import threading

import comfy.model_management as mm
import latent_preview
import torch

_get_previewer = latent_preview.get_previewer
_acting = {"act": None, "previews": 0}


def _evict():
    mm.unload_all_models()
    mm.free_memory(1e30, mm.get_torch_device())
    mm.soft_empty_cache()
    gc.collect()


def _boom():
    raise RuntimeError("the neighbour's previewer is broken")


def _full():
    raise torch.OutOfMemoryError("the neighbour took the device")


ACTS = {
    "none": lambda: None,
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "attention": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "threads": lambda: torch.set_num_threads(2),
    "gradients": lambda: torch.set_grad_enabled(True),
    "seeds": lambda: torch.manual_seed(0),
    "evicts": _evict,
    "raises": _boom,
    "out of memory": _full,
    "signals": lambda: (
        None
        if threading.current_thread() is not threading.main_thread()
        else signal.signal(signal.SIGINT, signal.SIG_IGN)
    ),
}


def _state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "attention": torch.backends.cuda.flash_sdp_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
    }


def _reset():
    _acting.update(act=None)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_autocast_enabled("cpu", False)
    torch.backends.cuda.enable_flash_sdp(True)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(1)


class _Previewer:
    def __init__(self, inner):
        self.inner = inner

    def decode_latent_to_preview_image(self, preview_format, x0):
        _acting["previews"] += 1
        if _acting["act"] is not None:
            x0.zero_()  # what it is given, it takes for its own
            ACTS[_acting["act"]]()
            return None
        return self.inner.decode_latent_to_preview_image(preview_format, x0)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def _previewer(*given, **named):
    found = _get_previewer(*given, **named)
    return None if found is None else _Previewer(found)


latent_preview.get_previewer = _previewer


class WanFitNeighbour:
    """Passes a pipeline on, and acts."""

    INPUT_TYPES = classmethod(
        lambda cls: {
            "required": {
                "pipeline": ("WAN_PIPELINE",),
                "act": (list(ACTS),),
                "when": (["before", "preview"],),
            }
        }
    )
    RETURN_TYPES = ("WAN_PIPELINE",)
    FUNCTION = "do"
    CATEGORY = "WanFit tests"
    IS_CHANGED = classmethod(lambda cls, **_: float("nan"))

    def do(self, pipeline, act, when):
        _reset()
        _acting["previews"] = 0
        if when == "preview":
            _acting["act"] = act
        else:
            ACTS[act]()
        return (pipeline,)


class WanFitNeighbourState:
    """Shows what is set after the IMAGE it waits for was made, and puts everything back."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"after": ("IMAGE",)}})
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "show"
    CATEGORY = "WanFit tests"
    IS_CHANGED = classmethod(lambda cls, **_: float("nan"))

    def show(self, after):
        found = _state()
        _reset()
        return {"ui": {"state": [found], "previews": [_acting["previews"]]}}


NODE_CLASS_MAPPINGS = {
    "WanFitNeighbour": WanFitNeighbour,
    "WanFitNeighbourState": WanFitNeighbourState,
}
