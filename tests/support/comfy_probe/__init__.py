"""A custom-node pack for tests only: lets a test look into and push on a running ComfyUI."""

import gc
import sys

import comfy.model_management as mm
import folder_paths
import torch
from aiohttp import web
from comfy_execution.progress import get_progress_state
from server import PromptServer

routes = PromptServer.instance.routes


async def _keep_imports_out_of_collections(app):
    """Every collection would walk through all that ComfyUI imports, 0.4 s each time."""
    gc.freeze()


# Once the nodes are loaded: how long a pack takes for that stays what it is.
PromptServer.instance.app.on_startup.append(_keep_imports_out_of_collections)


def _core(name):
    """Find a module of the pack under whatever name ComfyUI imported it."""
    return next(m for n, m in sys.modules.items() if n.endswith(f".wan_core.{name}"))


def _weights():
    """Count the bytes of weights in the component cache."""
    if not any(name.endswith(".wan_core.loading.cache") for name in sys.modules):
        return 0
    return sum(
        tensor.numel() * tensor.element_size()
        for _, module in _core("loading.cache").component_cache().loaded()
        if isinstance(module, torch.nn.Module)
        for tensor in module.parameters()
    )


@routes.get("/wanfit_probe/state")
async def state(request):
    nodes = getattr(get_progress_state(), "nodes", {})
    return web.json_response(
        {
            "flags": PromptServer.instance.prompt_queue.get_flags(reset=False),
            "progress": {k: [v["value"], v["max"]] for k, v in nodes.items()},
            "loaded": [type(p.model).__name__ for p in mm.loaded_models()],
            "loaded_bytes": sum(p.loaded_size() for p in mm.loaded_models()),
            "weight_bytes": _weights(),
            "heavy_modules": [n for n in ("diffusers", "transformers") if n in sys.modules],
        }
    )


@routes.post("/wanfit_probe/collect")
async def collect(request):
    """Collect garbage, which ComfyUI does every ten seconds at most; also what was frozen above."""
    gc.unfreeze()
    found = gc.collect()
    gc.freeze()
    return web.json_response({"collected": found})


@routes.post("/wanfit_probe/free_memory")
async def free_memory(request):
    """What ComfyUI does when another model needs more than is free."""
    unloaded = mm.free_memory(1e30, mm.get_torch_device())
    return web.json_response({"unloaded": len(unloaded)})


class WanFitProbeSave:
    """Writes an IMAGE's exact values to the output folder."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"images": ("IMAGE",), "name": ("STRING", {"default": "x"})}}
    )
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"
    CATEGORY = "WanFit tests"

    def save(self, images, name):
        torch.save(images.clone(), f"{folder_paths.get_output_directory()}/{name}.pt")
        return {"ui": {"shape": list(images.shape)}}


class WanFitProbeText:
    """Shows a STRING, FLOAT or BOOLEAN in the history."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("*", {})}})
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "show"
    CATEGORY = "WanFit tests"

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def show(self, value):
        return {"ui": {"value": [value]}}


class WanFitProbeConditioning:
    """A CONDITIONING that holds the tensor of a file in the input folder."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"name": ("STRING", {"default": "x"})}})
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "load"
    CATEGORY = "WanFit tests"

    def load(self, name):
        path = f"{folder_paths.get_input_directory()}/{name}.pt"
        return ([[torch.load(path, weights_only=True), {}]],)


class WanFitProbeSound:
    """An AUDIO of noise, two channels at 44,100 samples a second."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"seconds": ("FLOAT", {"default": 1.0})}})
    RETURN_TYPES = ("AUDIO",)
    FUNCTION = "make"
    CATEGORY = "WanFit tests"

    def make(self, seconds):
        return ({"waveform": torch.rand(1, 2, int(seconds * 44100)), "sample_rate": 44100},)


NODE_CLASS_MAPPINGS = {
    "WanFitProbeConditioning": WanFitProbeConditioning,
    "WanFitProbeSave": WanFitProbeSave,
    "WanFitProbeSound": WanFitProbeSound,
    "WanFitProbeText": WanFitProbeText,
}
