"""A custom-node pack for tests only: lets a test look into and push on a running ComfyUI."""

import gc
import importlib
import sys
from types import SimpleNamespace

import comfy.model_management as mm
import folder_paths
import torch
from aiohttp import web
from comfy.model_patcher import ModelPatcher
from comfy_execution.progress import get_progress_state
from server import PromptServer

routes = PromptServer.instance.routes


async def _keep_imports_out_of_collections(app):
    """Every collection would walk through all that ComfyUI imports, 0.4 s each time."""
    gc.freeze()


# Once the nodes are loaded: how long a pack takes for that stays what it is.
PromptServer.instance.app.on_startup.append(_keep_imports_out_of_collections)


def _pack(name):
    """Return a module of the pack, under whatever name ComfyUI imported the pack."""
    # A copy: a prompt that runs beside this may import modules meanwhile.
    bridge = next(n for n in list(sys.modules) if n.endswith("wanfit.nodes.bridge"))
    return importlib.import_module(f"{bridge.removesuffix('.nodes.bridge')}.{name}")


def _weights():
    """Count the bytes of weights in the component cache."""
    if not any(name.endswith(".wan_core.loading.cache") for name in list(sys.modules)):
        return 0
    return sum(
        tensor.numel() * tensor.element_size()
        for _, module in _pack("wan_core.loading.cache").component_cache().loaded()
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
            "loaded": [type(p.model).__name__ for p in mm.loaded_models() if p is not None],
            "loaded_bytes": sum(p.loaded_size() for p in mm.loaded_models() if p is not None),
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


@routes.post("/wanfit_probe/evict_amid_garbage")
async def evict_amid_garbage(request):
    """Free memory while models that nobody uses any more wait to be collected."""
    gc.disable()  # a collection of its own accord would make this pass or fail by chance
    try:
        _register_some()
        mm.free_memory(1e30, mm.get_torch_device())
        broken = [str(entry.model) for entry in mm.current_loaded_models if not entry.real_model]
        sizes = {name: _pack("nodes.lease").loaded_bytes(files) for name, files in FILES.items()}
    finally:
        gc.enable()
    return web.json_response({"broken": broken, "loaded": sizes})


FILES = {name: frozenset({f"/nowhere/{name}.safetensors"}) for name in ("first", "gone", "last")}


def _register_some():
    """Three of our models and a native one; one of ours and the native one are garbage."""
    cache, lease = _pack("wan_core.loading.cache"), _pack("nodes.lease")
    for name, files in FILES.items():
        identity = _pack("wan_core.files").FileIdentity(next(iter(files)), 1, 1)
        key = cache.ComponentKey("transformer", (identity,), "fp32")
        with cache.component_cache().borrow(key, 1, lambda: torch.nn.Linear(8, 8)):
            pass
        pipeline = SimpleNamespace(architecture=SimpleNamespace(nbytes=1000))
        pipeline.lease = lease.WeightsLease(None, files, {})
        estimate = SimpleNamespace(peak_usage_mb=1, generation_overhead_mb=0)
        with _pack("nodes.bridge").room_for(pipeline, estimate):
            pass
        pipeline.itself = pipeline
        if name == "gone":
            del pipeline
            continue
        KEPT[name] = pipeline
    cpu = torch.device("cpu")
    native = ModelPatcher(torch.nn.Linear(8, 8), mm.get_torch_device(), cpu)
    mm.load_models_gpu([native])
    native.itself = native


KEPT = {}


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


class _Any(str):
    """A type that goes with every other, as nodes of other packs have it."""

    def __ne__(self, other):
        return False


class WanFitProbeAny:
    """Gives a text to an input of any type."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("STRING", {"default": ""})}})
    RETURN_TYPES = (_Any("*"),)
    FUNCTION = "give"
    CATEGORY = "WanFit tests"

    def give(self, value):
        return (value,)


NODE_CLASS_MAPPINGS = {
    "WanFitProbeAny": WanFitProbeAny,
    "WanFitProbeConditioning": WanFitProbeConditioning,
    "WanFitProbeSave": WanFitProbeSave,
    "WanFitProbeSound": WanFitProbeSound,
    "WanFitProbeText": WanFitProbeText,
}
