"""Lines into jobs: each is checked by itself, and a bad one says what is wrong with it.

A line is a JSON object: ``output`` (a name within the folder of the outputs), ``model`` (a folder
or file; or the batch's own), fields of ``GenerationConfig`` that text can state, and ``loras``
(FILE[:EXPERT[:STRENGTH]]), ``use_recipe``, ``optimization`` (fields of ``OptimizationConfig``) and
``priority`` (higher ones first). Empty lines and lines that begin with # are comments. Paths of
inputs are relative to the folder of the file.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import GenerationConfig, WanControl, plain_number
from ..detect import parse_lora
from ..errors import InvalidRequest, MissingFile, WanError
from ..files import contained_path, file_identity, name_problem
from ..job import MOST_CLIPS, MOST_FRAMES, clip_paths
from ..models import Defaults
from ..plan import OptimizationConfig

MOST_LINE, MOST_LINES = 2**20, 1_000_000
_MOST_FILES = 10_000
"""Of a model's folder: such as a whole disk that was named would be walked for hours."""
_NOT_IN_A_LINE = frozenset({
    "latents", "prompt_embeds", "negative_prompt_embeds", "continue_from", "audio", "output_path",
    "output_metadata", "return_frames", "journal_folder", "warning_callback", "progress_callback",
    "preview_callback", "chunk_callback", "decode_callback", "load_callback", "interrupt_check",
})  # fmt: skip
"""Fields that hold tensors or functions, or that the batch sets itself."""
_OWN = ("model", "output", "loras", "use_recipe", "optimization", "priority")
_AS_OPTIONS = {
    "frames": "num_frames", "steps": "num_inference_steps", "window": "max_chunk_size",
    "overlap": "window_overlap", "schedule": "window_schedule", "fusion": "window_fusion",
    "mode": "window_mode", "anchor": "window_anchor", "lora": "loras",
}  # fmt: skip
"""What the options of ``generate`` are called in a line."""
_PIPES = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))
"""Where a shell names what it pipes in."""
_WHERE = ("device", "devices")
"""Fields of ``OptimizationConfig`` that say where a clip is made."""
_OF_A_PLAN = frozenset(one.name for one in fields(OptimizationConfig))
CONFIG_FIELDS = tuple(
    one.name for one in fields(GenerationConfig) if one.name not in _NOT_IN_A_LINE
)
_CONTROL_VIDEOS = ("video", "mask", "face_video", "background_video")
_CONTROL_FILES = (*_CONTROL_VIDEOS, "reference", "keyframes", "camera", "tracks")
_CONTROL_VALUES = ("positions", "strength", "denoise", "clear_masked")


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no job, and why."""

    number: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """One job of a batch; ``number`` is its line, counted from 1."""

    number: int
    model: Path
    output: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``GenerationConfig``; pictures are absolute paths."""
    control: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``WanControl`` whose tensors are given as paths of files."""
    loras: tuple[str, ...] = ()
    use_recipe: bool = False
    optimization: Mapping[str, Any] = field(default_factory=dict)
    priority: float = 0.0

    @property
    def group(self) -> str:
        """Name what jobs must have in common to run with one model."""
        return self._group(dict(self.optimization))

    def _group(self, optimization: Mapping[str, Any]) -> str:
        return _canonical([str(self.model), self.loras, self.use_recipe, optimization])

    @property
    def outputs(self) -> list[Path]:
        """Return where its clips lie, several with a ``batch_size``; a wrong one counts as 1."""
        asked = plain_number(self.values.get("batch_size", 1))
        count = int(asked) if asked is not None and 1 <= asked <= MOST_CLIPS else 1
        return clip_paths(self.output, count)

    def identity(self) -> str:
        """Name everything that the clip depends on: the job, and its files as they are now.

        Not on which cards: a batch that goes on with more of them makes nothing anew. Raises
        MissingFile where a file does not exist.
        """
        named = [self.model, *(Path(parse_lora(text).path) for text in self.loras)]
        named += [Path(self.values[n]) for n in ("image", "last_image") if self.values.get(n)]
        for value in (self.control.get(name) for name in _CONTROL_FILES):
            named += [Path(one) for one in ([value] if isinstance(value, str) else value or [])]
        files = [_state_of(path) for path in named]
        wishes = {n: v for n, v in self.optimization.items() if n not in _WHERE}
        job = [self._group(wishes), dict(self.values), dict(self.control), str(self.output), files]
        return hashlib.sha256(_canonical(job).encode()).hexdigest()[:32]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self) | {"model": str(self.model), "output": str(self.output)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BatchJob:
        """Return the job that ``to_dict`` made these values of."""
        places = {name: Path(values[name]) for name in ("model", "output")}
        return cls(**{**values, **places, "loras": tuple(values["loras"])})

    def config(self, usual: Defaults) -> GenerationConfig:
        """Return the job as the library takes it; reads the videos of its control.

        Where it names no size or length it has the ``usual`` one, its model's.
        """
        shape = usual.shape(*(self.values.get(n) for n in ("width", "height", "num_frames")))
        control = None if not self.control else _control(self.control, shape["num_frames"])
        values = {"resume": "auto", **self.values, **shape}
        return GenerationConfig(
            **values, control=control, output_path=self.output, return_frames=False
        )


def kept_object(text: str | None) -> dict[str, Any] | None:
    """Return an object that was kept as JSON; None where another hand, or the disk, changed it.

    Written is ASCII alone: other characters are bytes that are no text.
    """
    try:
        found = json.loads(text) if text is not None and text.isascii() else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def kept_job(text: str, number: int, here: Callable[[str], str]) -> BatchJob | None:
    """Return the job that ``to_dict`` made, kept as JSON, with its paths as ``here`` says them.

    None where the text is no job any more.
    """
    values = kept_object(text)
    parts = ("values", "control", "optimization")
    if values is None or not all(isinstance(values.get(name), dict) for name in parts):
        return None
    for name in parts[:2]:
        found = values[name].items()
        values[name] = {n: here(one) if isinstance(one, str) else one for n, one in found}
    try:
        output = here(values["output"])
        return BatchJob.from_dict({**values, "output": output, "number": number})
    except (ValueError, TypeError, KeyError):
        return None


def read_jobs(
    path: Path, folder: Path, model: Path | None = None,
    optimization: Mapping[str, Any] | None = None,
) -> Iterator[BatchJob | BadLine]:  # fmt: skip
    """Yield the jobs of a file in its order, and its bad lines where they are.

    ``folder`` is where outputs go, ``model`` the model of lines that name none, ``optimization``
    what holds for all lines that do not say otherwise. Raises MissingFile where the file cannot be
    read, and InvalidRequest for one of more than a million lines.
    """
    taken: dict[str, tuple[int, str]] = {}
    here = base_of(path)
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by the with below
    except OSError as err:
        raise MissingFile(f"The jobs {path} cannot be read: {err.strerror}.") from err
    with file:
        number = 0
        while line := file.readline(MOST_LINE + 1):
            number += 1
            if number == 1:  # of a pipe too, which does not go back to its beginning
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise InvalidRequest(f"{path} is UTF-16; save it as UTF-8.")
                line = line.removeprefix(codecs.BOM_UTF8)
            if number > MOST_LINES:
                raise InvalidRequest(f"{path} has more than {MOST_LINES:,} lines; cut it up.")
            whole = line.endswith(b"\n") or len(line) <= MOST_LINE
            while not line.endswith(b"\n") and (more := file.readline(MOST_LINE)):
                line = more  # the rest of a line that is too long
            if whole and (not line.strip() or line.lstrip().startswith(b"#")):
                continue
            try:
                if not whole:
                    raise InvalidRequest(f"the line has more than {MOST_LINE} bytes.")
                job = _job(number, line, here, folder, model, optimization or {})
                _check_taken(job, taken)
            except WanError as err:
                yield BadLine(number, str(err))
            else:
                yield job


def base_of(path: Path) -> Path:
    """Return the folder that the paths of a file of jobs begin in: its own.

    What a shell pipes in (``/dev/stdin``, ``<(...)``) has none; then it is where one is.
    """
    return Path.cwd() if path.parent in _PIPES else path.resolve().parent


def _check_taken(job: BatchJob, taken: dict[str, tuple[int, str]]) -> None:
    """Take the job's outputs; raise InvalidRequest where an earlier line makes one of them.

    ``taken`` has line and name by what is alike.
    """
    own = {_alike(output): output for output in job.outputs}
    for alike, output in own.items():
        if alike not in taken:
            continue
        first, name = taken[alike]
        what = "output is" if output == job.output else "with batch_size another output is"
        differs = (
            ""
            if name == output.name
            else f" but for its letters ({name!r}), which not all disks tell apart"
        )
        raise InvalidRequest(
            f"{what} {output.name!r}, as in line {first}{differs}.", field="output"
        )
    taken.update({alike: (job.number, output.name) for alike, output in own.items()})


def _alike(output: Path) -> str:
    """Return what is equal for outputs that are one, through a linked folder or on some disk.

    macOS' and Windows' take names for one that differ in case, or in how an accent is written.
    """
    real = os.path.join(os.path.realpath(output.parent), output.name)
    return unicodedata.normalize("NFC", os.path.normcase(real)).casefold()


def _job(
    number: int, line: bytes, here: Path, folder: Path, model: Path | None,
    optimization: Mapping[str, Any],
) -> BatchJob:  # fmt: skip
    values = json_object(line, "the line")
    for name in values:
        if name not in (*_OWN, *CONFIG_FIELDS):
            near = difflib.get_close_matches(name, (*_OWN, *CONFIG_FIELDS), 1)
            near = [_AS_OPTIONS[name]] if name in _AS_OPTIONS else near
            meant = f"; did you mean {near[0]!r}?" if near else ""
            if name in _OF_A_PLAN:
                meant = f'; give it as "optimization": {{"{name}": ...}}.'
            raise InvalidRequest(f"{name!r} is no field of a job{meant}", field=name)
    where = _text(values, "model", None if model is None else str(model.resolve()))
    output = _output(values, folder.resolve())
    loras = values.get("loras", [])
    if not isinstance(loras, list) or not all(isinstance(one, str) for one in loras):
        raise InvalidRequest("loras must be a list of FILE[:EXPERT[:STRENGTH]].", field="loras")
    priority = plain_number(values.get("priority", 0))
    if priority is None:
        raise InvalidRequest(f"priority is {values['priority']!r}; a number is needed.")
    if not isinstance(values.get("use_recipe", False), bool):
        raise InvalidRequest("use_recipe must be true or false.", field="use_recipe")
    asked = values.get("optimization", {})
    if not isinstance(asked, dict):
        raise InvalidRequest("optimization must be an object.", field="optimization")
    wishes = {**optimization, **asked}
    OptimizationConfig.from_mapping(wishes)
    given = {n: v for n, v in values.items() if n in CONFIG_FIELDS and n != "control"}
    for name in ("image", "last_image"):
        if given.get(name) is not None:
            given[name] = str(here / os.path.expanduser(_text(given, name, None)))
    return BatchJob(
        number=number,
        model=(here / os.path.expanduser(where)),
        output=output,
        values=given,
        control=_control_paths(values.get("control"), here),
        loras=tuple(placed_lora(text, here) for text in loras),
        use_recipe=values.get("use_recipe", False),
        optimization=wishes,
        priority=priority,
    )


def _output(values: Mapping[str, Any], folder: Path) -> Path:
    name = _text(values, "output", None)
    if problem := name_problem(name):
        raise InvalidRequest(
            f"output {name[:120]!r} is refused: {problem}. Give a name within {str(folder)!r}, "
            "such as foxes/one.mp4; another --folder puts all clips elsewhere.",
            field="output",
        )
    output = contained_path(folder, name)
    if output.suffix.lower() != ".mp4":
        raise InvalidRequest(f"output is {output.name!r}; it must end in .mp4.", field="output")
    return output


def json_object(text: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object that ``what`` (for a message) holds; raises InvalidRequest."""
    try:
        values = json.loads(text, object_pairs_hook=_once)
    except WanError:
        raise
    except (ValueError, RecursionError) as err:
        raise InvalidRequest(f"{what} is not JSON ({str(err)[:100]}).") from err
    if not isinstance(values, dict):
        raise InvalidRequest(f"{what} must be a JSON object.")
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as err:  # names and values alike are told again, in UTF-8
        raise InvalidRequest(
            f"{what} holds half of a character (a lone surrogate, as left by cutting an emoji in "
            "two). Write that place anew."
        ) from err
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; a name that is given twice would silently be the last one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"{twice!r} is given twice.", field=twice)
    return found


def _text(values: Mapping[str, Any], name: str, usual: str | None) -> str:
    value = values.get(name, usual)
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{name} is {value!r}; a path is needed.", field=name)
    return value


def placed_lora(text: str, here: Path) -> str:
    """Return a LoRA's text, FILE[:EXPERT[:STRENGTH]], whole and with the file below ``here``."""
    lora = parse_lora(text)
    return f"{here / os.path.expanduser(lora.path)}:{lora.expert}:{lora.strength!r}"


def _control_paths(given: Any, here: Path) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InvalidRequest("control must be an object.", field="control")
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in (*_CONTROL_FILES, *_CONTROL_VALUES):
            known = ", ".join((*_CONTROL_FILES, *_CONTROL_VALUES))
            raise InvalidRequest(f"control has no field {name!r}; known are {known}.")
        if name in _CONTROL_FILES:
            many = name in ("reference", "keyframes") and isinstance(value, list)
            paths = value if many else [value]
            if not paths or not all(isinstance(one, str) and one for one in paths):
                raise InvalidRequest(f"control.{name} must be the path of a file.", field="control")
            placed = [str(here / os.path.expanduser(one)) for one in paths]
            found[name] = placed if name in ("reference", "keyframes") else placed[0]
        else:
            found[name] = value
    return found


def _control(given: Mapping[str, Any], asked: Any) -> WanControl:
    """Read the files of a control for a clip of so many frames."""
    from ..files import decode_text
    from ..render import read_numbers, read_pictures, read_video

    frames = int(plain_number(asked) or 0)
    most = (frames if frames > 0 else MOST_FRAMES) + 3  # 0: as long as the control's video
    read: dict[str, Any] = {n: v for n, v in given.items() if n in _CONTROL_VALUES}
    for name in _CONTROL_VIDEOS:
        if name in given:
            read[name] = read_video(given[name], f"control.{name}", most)
    if "mask" in read:
        read["mask"] = read["mask"][..., 0]
    if "keyframes" in given:
        read["keyframes"] = read_pictures(given["keyframes"], "control.keyframes")
    if "reference" in given:  # of several sizes, if they like
        read["reference"] = [
            read_pictures([one], "control.reference") for one in given["reference"]
        ]
    if "camera" in given:
        read["camera"] = read_numbers(given["camera"], "control.camera")
    if "tracks" in given:
        try:
            read["tracks"] = decode_text(Path(given["tracks"]).read_bytes())
        except (OSError, UnicodeDecodeError) as err:
            raise MissingFile(f"control.tracks cannot be read: {err}.") from err
    return WanControl(**read)


def _state_of(path: Path) -> list[Any]:
    """Return a file's path, size and time of change; of a folder those of all files in it."""
    inside = [path]
    if path.is_dir():
        inside = sorted(islice((one for one in path.rglob("*") if one.is_file()), _MOST_FILES + 1))
    if len(inside) > _MOST_FILES:
        raise InvalidRequest(
            f"{str(path)!r} holds more than {_MOST_FILES:,} files, and a model some dozens. Name "
            "the model's own folder.",
            field="model",
        )
    found = [file_identity(one) for one in inside]
    return [[one.path, one.size, one.mtime_ns] for one in found]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
