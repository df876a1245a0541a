"""The one file that touches ComfyUI's own modules: folders, memory, progress, interrupt, video.

The public node API (``comfy_api.latest``: io, ui) is used by the node files directly.
"""

from __future__ import annotations

import inspect
import json
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.latent_formats
import comfy.model_management as mm
import comfy.utils
import folder_paths
import latent_preview
import psutil
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from comfy_execution.graph_utils import ExecutionBlocker
from server import PromptServer

from ..wan_core.config import MIB
from ..wan_core.preferences import read_preferences
from .files import SUFFIXES, Folders
from .lease import loaded_bytes, unload
from .pipeline import WanPipeline, is_offered, portable
from .preview import demo_decoder, linear, moving, pictures, same_latents

if TYPE_CHECKING:
    from ..wan_core.config import MemoryEstimate
    from ..wan_core.job import Request
    from ..wan_core.memory import SystemResources
    from ..wan_core.plan import OptimizationPlan
    from ..wan_core.render import WanPipelineWrapper
    from .route import Route
    from .watch import Watch

log = logging.getLogger("wanfit")


# -- folders ------------------------------------------------------------------------------------
def model_roots() -> list[Path]:
    """Return ComfyUI's folders for diffusers models, including those of extra_model_paths.yaml."""
    return [Path(root) for root in folder_paths.get_folder_paths("diffusers")]


_FOLDERS = {
    "transformer": "diffusion_models",
    "transformer_2": "diffusion_models",
    "text_encoder": "text_encoders",
    "vae": "vae",
    "image_encoder": "clip_vision",
}
_ALL_IN_ONE = "checkpoints"
"""Where files lie that hold a transformer with its VAE and text encoder, among other models."""


def model_files() -> dict[str, dict[str, Path]]:
    """Return per component the single files in ComfyUI's folders for it, by the name to show.

    Files that can run code when they are opened (.pth, .ckpt ...) are left out. The folders are
    searched here and not by ComfyUI, because its own lists leave out GGUF files.
    """
    found: dict[str, dict[str, Path]] = {}
    for part, folder in _FOLDERS.items():
        names: dict[str, Path] = {}
        roots = list(folder_paths.get_folder_paths(folder))
        if part.startswith("transformer"):
            roots += folder_paths.get_folder_paths(_ALL_IN_ONE)
        for root in map(Path, roots):
            # Linked folders are followed, as in ComfyUI's own lists.
            for name in sorted(folder_paths.recursive_search(str(root), [".git"])[0]):
                if is_offered(name, SUFFIXES) and (root / name).is_file():
                    names.setdefault(Path(name).as_posix(), root / name)
        found[part] = names
    return found


def folders() -> Folders:
    """Return what ComfyUI's folders hold now."""
    return Folders(tuple(model_roots()), model_files(), part_folders(), lora_path)


def part_folders() -> dict[str, str]:
    """Return per component the folder that its single files belong in."""
    found = {}
    for part, name in _FOLDERS.items():
        roots = folder_paths.get_folder_paths(name)
        # ComfyUI lists folders with old names (models/unet) first; prefer the current name.
        found[part] = next((root for root in roots if Path(root).name == name), roots[0])
    return found


def lora_names() -> list[str]:
    """Return the names of the LoRA files in ComfyUI's folders, relative to models/loras."""
    names = folder_paths.get_filename_list("loras")
    return [name for name in names if is_offered(name, (".safetensors",))]


def lora_path(name: str) -> Path | None:
    """Return the path of the LoRA file of this name, or None if there is none."""
    found = [folder_paths.get_full_path("loras", one) for one in (name, portable(name))]
    return next((Path(path) for path in found if path is not None), None)


def temp_video_path(width: int, height: int) -> Path:
    """Return a new file name for an mp4 below ComfyUI's temp folder (emptied at each start).

    Several ComfyUI with one folder count alike, and each makes its clip at the same time.
    """
    temp = folder_paths.get_temp_directory()
    folder, name, counter, _, _ = folder_paths.get_save_image_path("wanfit", temp, width, height)
    return Path(folder) / f"{name}_{counter:05}_{secrets.token_hex(4)}.mp4"


def as_shown(path: Path) -> dict[str, str]:
    """Return a file below ComfyUI's temp folder as the page asks for it."""
    folder = path.parent.relative_to(folder_paths.get_temp_directory()).as_posix()
    return {"filename": path.name, "subfolder": "" if folder == "." else folder, "type": "temp"}


def journal_folder() -> Path:
    """Return the folder for journals, in ComfyUI's output folder: restarts do not empty it."""
    return Path(folder_paths.get_output_directory()) / ".wanfit"


def no_picture() -> Any:
    """Return the placeholder for an IMAGE that was not asked for.

    A node connected to it does not run, and ComfyUI shows this text as the reason.
    """
    return ExecutionBlocker("WanChunkedSampler: return_images is off; use its video output.")


def workflow_metadata(hidden: Any) -> dict[str, str]:
    """Return prompt and workflow for the mp4's metadata, as ComfyUI's own SaveVideo stores them.

    Empty where ComfyUI was started with --disable-metadata.
    """
    if args.disable_metadata or hidden is None:
        return {}
    stored = dict(hidden.extra_pnginfo or {})
    if hidden.prompt is not None:
        stored["prompt"] = hidden.prompt
    return {key: json.dumps(value) for key, value in stored.items()}


def video_from_file(path: Path) -> Any:
    """Wrap an mp4 as ComfyUI's VIDEO; its frames stay on disk."""
    try:
        from comfy_api.latest import InputImpl
    except ImportError:  # older releases have the class elsewhere
        from comfy_api.input_impl import VideoFromFile

        return VideoFromFile(str(path))
    return InputImpl.VideoFromFile(str(path))


# -- features of the installed version ----------------------------------------------------------
def known(constructor: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Return those of ``options`` that the installed ComfyUI's ``constructor`` accepts."""
    accepted = inspect.signature(constructor).parameters
    return {name: value for name, value in options.items() if name in accepted}


# -- interrupt, progress, previews --------------------------------------------------------------
def check_interrupt() -> None:
    """Raise ComfyUI's interrupt if the user asked for one; nothing may catch it on its way."""
    mm.throw_exception_if_processing_interrupted()


def progress_bar(pipeline: WanPipeline) -> Callable[[float, float, torch.Tensor | None], None]:
    """Return a callback (done, total, latents to show or None) that moves the node's progress bar.

    The latents are normalised (B, C, T, h, w) and go to the previewer that ComfyUI is set to; most
    previewers show the first frame. There is none where the page shows a moving preview of ours,
    nor for a VAE whose latents ComfyUI does not know.
    """
    found = None if _watcher() is not None else _latent_format(pipeline)
    # Looked up on the module at call time: node packs that animate previews replace this function.
    previewer = found and latent_preview.get_previewer(mm.get_torch_device(), found)
    decode = _guarded(lambda x: previewer.decode_latent_to_preview_image("JPEG", x))
    bar = comfy.utils.ProgressBar(1)

    def show(done: float, total: float, latents: torch.Tensor | None) -> None:
        preview = None if previewer is None or latents is None else decode(latents)
        bar.update_absolute(done, total, preview)

    return show


def _guarded(preview: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``preview``, giving None from its first failure on: no reason to lose a render."""
    failed = False

    def guarded(*values: Any) -> Any:
        nonlocal failed
        if failed:
            return None
        try:
            return preview(*values)
        except mm.InterruptProcessingException:
            raise
        except Exception:  # of another pack, perhaps
            failed = True
            log.exception("WanFit: a preview could not be made; no more previews in this run.")
        return None

    return guarded


def _latent_format(pipeline: WanPipeline) -> Any:
    """Return ComfyUI's description of the latents of this VAE, or None for one it has not."""
    vae = pipeline.vae
    for kind in (comfy.latent_formats.Wan21, comfy.latent_formats.Wan22):
        with torch.device("cpu"):  # whatever another pack has made the default
            found = kind()
        if same_latents(vae, found.latents_mean.flatten().tolist()):
            return found
    return None


# -- what the page is told while a clip is made ------------------------------------------------
_watchers: OrderedDict[str, None] = OrderedDict()
"""Pages, by ComfyUI's id of a client, that show what a render tells; the latest come last."""
_MOST_WATCHERS = 64


def _note_watcher(client: str | None) -> None:
    if client and len(client) <= 64:
        _watchers[client] = None
        _watchers.move_to_end(client)
        if len(_watchers) > _MOST_WATCHERS:
            _watchers.popitem(last=False)


def _watcher() -> str | None:
    """Return the page that queued the prompt that runs, if it shows what a render tells."""
    client = getattr(PromptServer.instance, "client_id", None)
    return client if client in _watchers else None


def watch(
    pipeline: WanPipeline, request: Request, plan: OptimizationPlan, node: str | None
) -> Watch | None:
    """Return what tells the page of the render of ``node``; None where no page wants to know."""
    from .watch import Watch

    client = _watcher()
    if client is None or node is None:
        return None

    def tell(message: dict[str, Any]) -> None:
        PromptServer.instance.send_sync("wanfit.run", {"node": node, **message}, client)

    moving = None if read_preferences().preview is False else _moving(pipeline)
    return Watch(request, plan, pipeline.architecture, tell, _memory_now, moving)


def _moving(pipeline: WanPipeline) -> Callable[[torch.Tensor, float], Any] | None:
    """Return what turns latents (B, C, T, h, w) and the clip's seconds into a moving preview."""
    known = _latent_format(pipeline)
    if known is None:
        decode = demo_decoder(pipeline.vae)
    else:
        decode = linear(known.latent_rgb_factors, known.latent_rgb_factors_bias)
    if decode is None:
        return None
    return _guarded(lambda latents, seconds: moving(pictures(decode, latents), seconds))


def _memory_now() -> tuple[int, str]:
    """Return the bytes in use on the device now, and where."""
    here = device()
    if here.type == "cuda":
        used = torch.cuda.memory_allocated(here)
        return used, f"on {torch.cuda.get_device_name(here)}"
    return psutil.Process().memory_info().rss, "in RAM, all of ComfyUI"


# -- memory -------------------------------------------------------------------------------------
def device() -> torch.device:
    """Return the device ComfyUI computes on."""
    return mm.get_torch_device()


def wrapper(pipeline: WanPipeline) -> WanPipelineWrapper:
    """Return wan_core's pipeline for a WAN_PIPELINE, on ComfyUI's device.

    Memory that ComfyUI's other models occupy counts as free, because ComfyUI moves them off the
    device before a run (see ``room_for``).
    """
    options = {**pipeline.optimization_config(), "device": str(device())}
    found = pipeline.lease.wrapper(options, pipeline.loras, pipeline.use_recipe)
    found.evictable_bytes = evictable_bytes()
    return found


def evictable_bytes() -> int:
    """Return the bytes of other nodes' models, which ComfyUI can move off the device."""
    here = device()
    return sum(
        int(patcher.loaded_size())
        for patcher in mm.loaded_models()
        # None stands for a model that is about to go.
        if patcher is not None
        and patcher.load_device == here
        and not isinstance(patcher, WeightsPatcher)
    )


class WanFitWeights(torch.nn.Module):
    """An empty module that stands for a checkpoint's weights in ComfyUI's list of loaded models."""


class WeightsPatcher(ModelPatcher):  # type: ignore[misc]
    """Lets ComfyUI see and evict weights whose placement wan_core decides.

    ComfyUI's model management calls these methods by name. Each answers from the component cache,
    which knows what is loaded, and not from ModelPatcher's own bookkeeping. It calls them from
    loops over its list of loaded models, any of its threads does, and an error would leave an entry
    in the list at which every later prompt fails. So they neither raise nor collect garbage: a
    finalizer of one of its models takes entries out of that list.
    """

    def __init__(self, files: frozenset[str], size: int) -> None:
        self._files = files
        self.in_use = False
        super().__init__(WanFitWeights(), mm.get_torch_device(), torch.device("cpu"), size=size)

    def loaded_size(self) -> int:
        # Two checkpoints may share an encoder or a VAE, which ComfyUI is to add up once: what an
        # entry before this one has counts there. A copy of the list, as finalizers take from it.
        shared: set[str] = set()
        for entry in list(mm.current_loaded_models):
            other = entry.model
            if other is self:
                break
            if isinstance(other, WeightsPatcher):
                shared |= other._files
        return loaded_bytes(self._files, self.load_device, frozenset(shared))

    def model_size(self) -> int:
        return int(self.size)

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() > 0 else self.offload_device

    def partially_load(self, device_to: Any, extra_memory: float = 0, **_: Any) -> int:
        # Nothing is loaded here: wan_core loads weights when a stage needs them. The call only has
        # to register the patcher with ComfyUI.
        return 0

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, **_: Any) -> int:
        # As much as is asked for and no more: what stays need not come back over the bus.
        return self._give_up(int(memory_to_free))

    def detach(self, unpatch_all: bool = True) -> Any:
        # With unpatch_all=False ComfyUI re-registers a model it is about to use: keep the weights.
        if unpatch_all:
            self._give_up(None)
        return self.model

    def _give_up(self, nbytes: int | None) -> int:
        if self.in_use:
            return 0
        try:
            freed = unload(self._files, self.load_device, nbytes)
        except (MemoryError, OSError, RuntimeError) as error:
            log.warning("WanFit: weights could not be unloaded for ComfyUI: %s", error)
            return 0
        log.info("WanFit: %.1f MiB of weights unloaded for ComfyUI", freed / MIB)
        return freed

    def __del__(self) -> None:  # ModelPatcher's own would touch hooks that this class lacks
        return


_patchers: dict[frozenset[str], WeightsPatcher] = {}
"""What stands for each set of files, a few bytes, for as long as ComfyUI runs. When one goes, its
finalizer takes an entry out of ComfyUI's list, maybe in the middle of a loop over that list."""


@contextmanager
def room_for(pipeline: WanPipeline, estimate: MemoryEstimate) -> Iterator[None]:
    """Register the pipeline's weights with ComfyUI and let it free memory for them, for one run.

    ComfyUI may evict the weights at any time outside the ``with`` block. Inside it they are in use,
    and ``detach`` does nothing.
    """
    files = pipeline.lease.files
    if files not in _patchers:
        _patchers[files] = WeightsPatcher(files, pipeline.architecture.nbytes)
    patcher = _patchers[files]
    weights = (estimate.peak_usage_mb - estimate.generation_overhead_mb) * MIB
    held = patcher.loaded_size()
    # What is still to come is asked for as memory and not as a model's size: for that, ComfyUI
    # takes page-locked memory away from other models, which would not help here.
    patcher.size = max(1, held)
    missing = estimate.generation_overhead_mb * MIB + max(0.0, weights - held)
    patcher.in_use = True
    try:
        mm.load_models_gpu([patcher], memory_required=missing)
        yield
    finally:
        patcher.in_use = False
        patcher.size = max(1, patcher.loaded_size())


def after_out_of_memory() -> None:
    """Unload every model from the device, as ComfyUI itself does when memory ran out."""
    mm.unload_all_models()


# -- the live plan ------------------------------------------------------------------------------
def _machine(pipeline: WanPipelineWrapper) -> SystemResources:
    """Return what the machine has for a render, and what ComfyUI would free for it."""
    pipeline.evictable_bytes = evictable_bytes()
    return pipeline.machine(str(device()))


def _busy() -> bool:
    return bool(getattr(PromptServer.instance.prompt_queue, "currently_running", None))


def add_route() -> None:
    """Answer the page's questions about what is wired (``route``); once, when nodes are loaded."""
    from aiohttp import web

    @cache
    def made() -> Route:
        from .live import Host, Live
        from .route import Route

        host = Host(folders, _machine, _busy)
        return Route(Live(host), Live(host))

    @PromptServer.instance.routes.post("/wanfit/plan")
    async def plan(request: web.Request) -> web.Response:
        route = made()  # with the first question: ComfyUI's start does not wait for it
        status, body = await route.answer(request.headers, request.content.iter_chunked(65536))
        if status == 200:
            _note_watcher(request.headers.get("WanFit-Client"))
        return web.Response(body=body, status=status, content_type="application/json")

    @PromptServer.instance.routes.post("/wanfit/watch")
    async def watches(request: web.Request) -> web.Response:
        from .route import refusal

        refused = refusal(request.headers)
        if refused is None:
            _note_watcher(request.headers.get("WanFit-Client"))
        return web.Response(status=204 if refused is None else refused[0])

    @PromptServer.instance.routes.post("/wanfit/convert")
    async def convert(request: web.Request) -> web.Response:
        from .convert import MOST_BYTES, answer

        chunks = request.content.iter_chunked(65536)
        status, body = await made().answer(request.headers, chunks, answer, MOST_BYTES)
        return web.Response(body=body, status=status, content_type="application/json")

    @PromptServer.instance.routes.post("/wanfit/tab")
    async def tab(request: web.Request) -> web.Response:
        from .session import SESSION
        from .tab import MOST_BYTES, Tab

        chunks = request.content.iter_chunked(65536)
        answer = Tab(SESSION, journal_folder).answer
        status, body = await made().answer(request.headers, chunks, answer, MOST_BYTES)
        return web.Response(body=body, status=status, content_type="application/json")
