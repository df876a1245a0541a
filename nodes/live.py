"""The plan of what is wired, answered while widgets change: no weight is read, nothing is kept.

Headers, models and their wrappers are remembered by the identity of their files, so that an answer
is arithmetic and takes milliseconds. No lease on weights is taken: a question must not keep weights
in memory. Does not import ComfyUI.
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..wan_core.config import GenerationConfig, WanLoRA, WanModelFiles
from ..wan_core.errors import InvalidRequest, MissingFile, WanError, first_line
from ..wan_core.files import file_identity
from ..wan_core.job import check_parts
from ..wan_core.preferences import read_preferences
from .answer import described, failed
from .files import Folders, absent_lora, model_source, unused_parts
from .fixes import fixes, swap_fix
from .job import device_options, generation_config, optimization_options, use_windows
from .pipeline import fingerprint
from .wired import SAMPLERS, SIZED, Node, Wired, read_wired, wants_fixes
from .words import said_in_words_of_the_nodes

if TYPE_CHECKING:
    from ..wan_core.detect import IdentifiedFile
    from ..wan_core.memory import SystemResources
    from ..wan_core.models import ModelArchitecture
    from ..wan_core.render import WanPipelineWrapper

log = logging.getLogger("wanfit")

FOLDERS_SECONDS, MACHINE_SECONDS = 2.0, 1.0
"""How long a look at the folders and at the machine is believed."""
FILES_SECONDS = 1.0
"""How long a look at a model's files and at the preferences is believed. Each question to the disk
lets go of the interpreter, and while a render computes it takes milliseconds to get it back."""
_KEPT_HEADERS, _KEPT_MODELS, _KEPT_LOOKS = 128, 16, 64
T = TypeVar("T")


@dataclass(frozen=True)
class Host:
    """What the live plan asks of ComfyUI."""

    folders: Callable[[], Folders]
    machine: Callable[[WanPipelineWrapper], SystemResources]
    """What the machine has for a render, and what could be freed for it."""
    busy: Callable[[], bool]
    """Whether a prompt runs: the memory that it holds will be free for the next one."""


@dataclass(frozen=True)
class Job:
    """What is wired, opened: a wrapper without weights, and what is asked of it."""

    wired: Wired
    wrapper: WanPipelineWrapper
    config: GenerationConfig
    found: tuple[str, ...]
    """What "auto" found, in sentences."""
    unused: list[str]
    """What was chosen and is not used, in sentences."""


class Live:
    """Answers requests; each method may be called from one thread at a time."""

    def __init__(self, host: Host, clock: Callable[[], float] = time.monotonic) -> None:
        self._host, self._clock = host, clock
        self._folders: tuple[float, Folders] | None = None
        self._machine: tuple[float, SystemResources] | None = None
        self._headers: OrderedDict[Any, IdentifiedFile | WanError] = OrderedDict()
        self._models: OrderedDict[Any, WanPipelineWrapper] = OrderedDict()
        self._looks: OrderedDict[Any, tuple[float, Any]] = OrderedDict()

    def answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return an HTTP status and a JSON object for a request; never raises.

        400 is for what is no request. A graph that cannot run is answered with 200 and ``ok``
        False: that is what the page asks about.
        """
        try:
            wired = read_wired(body)
        except WanError as error:
            graph = isinstance(error, InvalidRequest) and error.field == "pipeline"
            return (200 if graph else 400), failed(error)
        try:
            with said_in_words_of_the_nodes():
                return 200, self._plan(wired, wants_fixes(body))
        except WanError as error:
            return 200, failed(error, wired) | {"fixes": swap_fix(wired)}
        # The boundary of the route: a question must not fill the log, nor break the page.
        except Exception as error:  # noqa: BLE001
            log.info("WanFit: no plan for the page: %s: %s", type(error).__name__, error)
            text = f"The plan could not be made ({type(error).__name__}: {first_line(error)})."
            return 500, {"ok": False, "error": text, "fixes": []}

    def _plan(self, wired: Wired, with_fixes: bool) -> dict[str, Any]:
        job = self.open(wired)
        forecast = job.wrapper.foresee(job.config, self.machine(job.wrapper))
        if wired.asking.kind in SAMPLERS:  # it would be refused for a part that is missing
            check_parts(job.config, forecast.request, job.wrapper.architecture)
        answer = described(job, forecast, busy=self._host.busy())
        if with_fixes:
            answer["fixes"] = swap_fix(wired) + fixes(self, job, forecast)
        return answer

    def open(self, wired: Wired, **changed: str) -> Job:
        """Open what is wired, with some inputs of the loader changed; raises a WanError."""
        loader = wired.of_kind("WanLoader")[0]
        values = {**loader.values, **changed}
        for name in loader.wired:
            raise InvalidRequest(
                f"{name} of the loader comes from another node: the plan is known when that ran.",
                field=name,
            )
        model = str(values.get("model", ""))
        chosen = {n: str(v) for n, v in values.items() if n not in ("model", "use_recipe")}
        folders = self.folders()
        source, found = self._lately(
            ("source", model, tuple(sorted(chosen.items()))),
            lambda: model_source(model, chosen, folders, self.inspect),
        )
        loras = tuple(self._lora(node) for node in wired.of_kind("WanLoRA"))
        recipe = any(
            node.values["use_recipe"] for node in wired.chain if "use_recipe" in node.values
        )
        options: dict[str, Any] = {}
        for node in wired.of_kind("WanOptimize"):
            options |= optimization_options(node.values)
        options |= device_options(wired.asking.values)
        wrapper = self._wrapper(source, loras, recipe, options)
        config = config_of(wired.asking, wrapper.architecture)
        return Job(wired, wrapper, config, found, unused_parts(model, chosen, folders))

    def folders(self) -> Folders:
        """Return what ComfyUI's folders hold, as seen a moment ago."""
        now = self._clock()
        if self._folders is None or now - self._folders[0] > FOLDERS_SECONDS:
            self._folders = now, self._host.folders()
        return self._folders[1]

    def machine(self, wrapper: WanPipelineWrapper) -> SystemResources:
        """Return what the machine has when nothing is rendered: while a prompt runs, as before."""
        now = self._clock()
        old = self._machine is None or now - self._machine[0] > MACHINE_SECONDS
        if self._machine is None or (old and not self._host.busy()):
            self._machine = now, self._host.machine(wrapper)
        return self._machine[1]

    def inspect(self, path: str | Path) -> IdentifiedFile:
        """Say what a file is, from its header; read again only when the file was changed."""
        from ..wan_core.detect import inspect_file

        key = file_identity(path)

        def read() -> IdentifiedFile | WanError:
            try:
                return inspect_file(path)
            except WanError as error:
                return error.with_traceback(None)

        found = _kept(self._headers, key, read, _KEPT_HEADERS)
        if isinstance(found, WanError):
            raise found
        return found

    def _print_of(self, source: Path | WanModelFiles) -> str:
        return self._lately(("print", source), lambda: fingerprint(source))

    def _lately(self, key: Any, look: Callable[[], T]) -> T:
        """Return what was seen at most ``FILES_SECONDS`` ago, or look now; errors are not kept."""
        now = self._clock()
        if key not in self._looks or now - self._looks[key][0] > FILES_SECONDS:
            self._looks.pop(key, None)
            while len(self._looks) >= _KEPT_LOOKS:
                self._looks.popitem(last=False)
            self._looks[key] = now, look()
        seen: T = self._looks[key][1]
        return seen

    def _lora(self, node: Node) -> WanLoRA:
        name = str(node.values.get("lora", ""))
        path = self.folders().lora(name)
        if path is None:
            raise InvalidRequest(absent_lora(name), field="lora")
        return WanLoRA(str(path), str(node.values["expert"]), node.values["strength"])

    def _wrapper(
        self, source: Path | WanModelFiles, loras: tuple[WanLoRA, ...], recipe: bool,
        options: Mapping[str, Any],
    ) -> WanPipelineWrapper:  # fmt: skip
        """Return the model with its LoRAs and options, opened once for each state of its files."""
        preferences = self._lately("preferences", read_preferences)
        prints = tuple(
            (self._print_of(Path(lora.path)), lora.expert, lora.strength) for lora in loras
        )
        key = (self._print_of(source), prints, recipe, tuple(sorted(options.items())), preferences)

        def opened() -> WanPipelineWrapper:
            from ..wan_core.detect import ArchitectureDetector, with_loras
            from ..wan_core.loading import component_cache
            from ..wan_core.plan import OptimizationConfig
            from ..wan_core.render import WanPipelineWrapper

            architecture = ArchitectureDetector().detect_model_architecture(source)
            if architecture.incomplete:
                raise MissingFile(architecture.incomplete)
            architecture = with_loras(architecture, loras, use_recipe=recipe)
            return WanPipelineWrapper(
                architecture,
                optimization=OptimizationConfig.from_mapping(preferences.under(options)),
                cache=component_cache(),
                preferences=preferences.besides(options),
            )

        return _kept(self._models, key, opened, _KEPT_MODELS)


def _kept(kept: OrderedDict[Any, T], key: Any, make: Callable[[], T], most: int) -> T:
    """Return what is kept under ``key``, or make it; only the latest used are kept."""
    if key not in kept:
        kept[key] = make()
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)
    return kept[key]


def config_of(node: Node, architecture: ModelArchitecture) -> GenerationConfig:
    """Return the job of a node as far as its widgets say it, or the model's usual one.

    Raises InvalidRequest naming the input.
    """
    usual, values = architecture.variant.defaults, dict(node.values)
    if node.kind not in SIZED:
        return GenerationConfig(
            prompt="", width=usual.width, height=usual.height, num_frames=usual.num_frames
        )
    if node.kind == "WanEstimateMemory":
        size = {name: values[name] for name in ("width", "height", "num_frames")}
        config = GenerationConfig(prompt="", **size)
    else:
        assert node.kind in SAMPLERS
        config = generation_config(values)
        config.image = "start_image" if "start_image" in node.wired else None
        config.last_image = "end_image" if "end_image" in node.wired else None
        _texts(config, node)
    if values.get("window_frames"):
        use_windows(config, values["window_frames"], values["window_overlap"])
    if node.kind == "WanChunkedSampler":
        config.window_schedule, config.window_mode = values["schedule"], values["mode"]
        config.noise, config.window_fusion = values["noise"], values["fusion"]
        config.window_anchor = values["anchor"]
        config.return_frames = values["return_images"]
        config.prompts = values["prompts"].strip() or None
    if config.num_frames == 0 and "control" in node.wired:
        config.num_frames = usual.num_frames  # how long its video is, is known when it has run
    return config


def _texts(config: GenerationConfig, node: Node) -> None:
    """Put something in the place of embeddings that are wired: only whether they are is asked."""
    wired: Any = "wired"
    if "positive" in node.wired:
        config.prompt, config.prompt_embeds = None, wired
    if "negative" in node.wired:
        config.negative_prompt, config.negative_prompt_embeds = None, wired


def as_json(answer: Mapping[str, Any]) -> bytes:
    """Return an answer as JSON; numbers that JSON does not have do not occur in it."""
    return json.dumps(answer, allow_nan=False).encode()
