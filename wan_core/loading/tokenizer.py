"""Tokenizer, image processor and scheduler settings: the components that have no weights.

umT5's tokenizer comes from a folder, or is built from the SentencePiece model that repackaged text
encoders carry: as the tensor ``spiece_model``, or in the metadata of a GGUF file. All give the same
token ids. The SentencePiece model is parsed here, with bounds, because the packages that convert it
need protobuf, which ComfyUI does not install. Format: ``sentencepiece_model.proto`` of
github.com/google/sentencepiece.
"""

from __future__ import annotations

import codecs
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from ..errors import (
    CorruptFile,
    MissingDependency,
    MissingFile,
    ModelMismatch,
    UnsupportedModel,
)
from ..files import decode_text, open_regular, quoted
from ..formats import (
    SentencePieceModel,
    charsmap_problem,
    read_gguf_tokenizer,
    read_json,
    read_table,
)
from ..memory import tokenizer_was_made
from ..models import TEXT_TOKENS, tokenizer_tensor

MAX_MODEL_BYTES: Final = 64 * 2**20
"""Largest SentencePiece model that is read; umT5's has 4.5 MB."""
_EXTRA_IDS: Final = 300
"""Number of tokens ``<extra_id_N>`` after umT5's 256,000 pieces (from its tokenizer_config)."""
MOST_UNUSED: Final = 1024
"""Most rows of an encoder's embedding without a token: they are filled up to a round number (84 of
umT5's). More mean that the tokenizer is another model's."""
_UNIGRAM: Final = 1
_BROKEN: Final = "Download the file again."


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Return umT5's tokenizer from its folder, a ``spiece.model``, or a text encoder file.

    A text encoder file must hold the tensor ``spiece_model``, or be a GGUF file with a tokenizer in
    its metadata. Raises MissingFile when there is no tokenizer, CorruptFile when it cannot be read,
    UnsupportedModel for another kind of tokenizer.
    """
    from .moving import give_back_freed

    tokenizer = _loaded(Path(path))
    tokenizer_was_made(tokenizer)
    give_back_freed()  # making umT5's leaves as much again as it keeps, 115 MiB
    return tokenizer


def _loaded(source: Path) -> Any:
    if source.is_dir():
        return _from_folder(source)
    if source.suffix.lower() == ".gguf":
        return _build(read_gguf_tokenizer(source), quoted(source))
    if source.suffix.lower() in (".safetensors", ".sft"):
        return build_tokenizer(_embedded(source), quoted(source))
    if source.name == "tokenizer.json":
        return _from_folder(source.parent)
    with open_regular(source) as (file, size):
        if size > MAX_MODEL_BYTES:
            raise CorruptFile(f"{quoted(source)} has {size:,} bytes; no tokenizer has. {_BROKEN}")
        return build_tokenizer(file.read(size), quoted(source))


def check_tokenizer(tokenizer: Any, vocabulary: int, path: Path, encoder: Path) -> None:
    """Refuse a tokenizer whose tokens are not those of an encoder with ``vocabulary`` embeddings.

    With too many tokens the encoder fails on the first rare word; with far too few every word means
    something else. ``path`` and ``encoder`` name the two in the message.
    """
    tokens = len(tokenizer)
    if not vocabulary - MOST_UNUSED <= tokens <= vocabulary:
        raise ModelMismatch(
            f"The tokenizer {quoted(path)} has {tokens:,} tokens, the text encoder "
            f"{quoted(encoder)} has embeddings for {vocabulary:,}: they are of different models. "
            "Use the tokenizer of this text encoder."
        )


def _from_folder(folder: Path) -> Any:
    if (folder / "tokenizer.json").is_file():
        transformers = _transformers()
        try:
            with _without_marks(folder) as place:
                return transformers.AutoTokenizer.from_pretrained(
                    str(place), local_files_only=True, trust_remote_code=False
                )
        except (
            OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError,
            IndexError,
        ) as err:  # fmt: skip
            raise CorruptFile(
                f"The tokenizer in {quoted(folder)} cannot be read: {str(err)[:200]}. {_BROKEN}"
            ) from err
    model = folder / "spiece.model"
    if not model.is_file():
        inside = folder / "tokenizer"
        raise MissingFile(
            f"{quoted(folder)} holds neither tokenizer.json nor spiece.model. "
            + (
                f"Choose {quoted(inside)}, which is in it."
                if inside.is_dir()
                else "Download the tokenizer of the model again."
            )
        )
    return _loaded(model)


@contextmanager
def _without_marks(folder: Path) -> Iterator[Path]:
    """Yield a folder whose JSON files can be parsed: a copy where an editor of Windows saved one.

    transformers takes UTF-8 without a byte order mark and nothing else.
    """
    files = [path for path in folder.glob("*.json") if path.is_file()]
    marks = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    starts = []
    for path in files:
        with path.open("rb") as file:
            starts.append(file.read(3))
    if not any(start.startswith(marks) for start in starts):
        yield folder
        return
    with TemporaryDirectory(prefix="wanfit-tokenizer-") as name:
        for path in files:
            text = decode_text(path.read_bytes())
            (Path(name) / path.name).write_text(text, encoding="utf-8")
        yield Path(name)


def _embedded(path: Path) -> bytes:
    """Return the bytes of the tensor ``spiece_model``, in an all-in-one file under a prefix."""
    table = read_table(path)
    name = tokenizer_tensor(table.tensors)
    info = None if name is None else table.tensors[name]
    if info is None:
        raise MissingFile(
            f"{quoted(path)} carries no tokenizer (no tensor 'spiece_model'). Name a tokenizer "
            "folder or a spiece.model of umT5 as the tokenizer."
        )
    if info.dtype not in ("U8", "I8") or info.nbytes > MAX_MODEL_BYTES:
        raise CorruptFile(
            f"'spiece_model' of {quoted(path)} is {info.nbytes:,} bytes of {info.dtype}; at most "
            f"{MAX_MODEL_BYTES:,} bytes of U8 were expected. {_BROKEN}"
        )
    with open_regular(info.file) as (file, _):
        file.seek(info.start)
        return file.read(info.nbytes)


def build_tokenizer(data: bytes, where: str) -> Any:
    """Build the tokenizer from a SentencePiece model; ``where`` names it in messages.

    It does the same as T5's published ``tokenizer.json``: normalise, split at whitespace, divide
    into pieces by the unigram model, append ``</s>``.
    """
    return _build(parse_sentencepiece(data, where), where)


def _build(model: SentencePieceModel, where: str) -> Any:
    """Build the tokenizer of a SentencePiece model."""
    _check(model, where)
    transformers = _transformers()
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    pieces = list(model.pieces)
    known = {piece for piece, _ in pieces}
    extra = [f"<extra_id_{i}>" for i in range(_EXTRA_IDS - 1, -1, -1)]
    pieces += [(name, 0.0) for name in extra if name not in known]
    names = {piece: index for index, (piece, _) in enumerate(pieces)}
    if not {"<pad>", "</s>", "<unk>"} <= names.keys():
        raise UnsupportedModel(f"{where} has no <pad>, </s> and <unk>: it is not umT5's tokenizer.")
    try:
        backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=model.unknown))
        if model.charsmap:
            backend.normalizer = normalizers.Precompiled(model.charsmap)
    except Exception as err:  # tokenizers raises nothing more specific
        raise CorruptFile(f"{where} cannot be read: {str(err)[:200]}. {_BROKEN}") from err
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"],
        pair=["$A", "</s>", "$B", "</s>"],
        special_tokens=[("</s>", names["</s>"])],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=extra[::-1], model_max_length=TEXT_TOKENS,
        model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _check(model: SentencePieceModel, where: str) -> None:
    """Refuse what the tokenizers package takes, to answer wrongly or to panic at a text."""
    names = {piece for piece, _ in model.pieces}
    if "" in names or len(names) < len(model.pieces):
        problem: str | None = "a piece is empty, or stands twice"
    elif not all(math.isfinite(score) for _, score in model.pieces):
        problem = "a score is not a finite number"
    else:
        problem = charsmap_problem(model.charsmap)
    if problem:
        raise CorruptFile(f"The tokenizer in {where} is damaged: {problem}. {_BROKEN}")


# SentencePiece -----------------------------------------------------------------------------------


def parse_sentencepiece(data: bytes, where: str) -> SentencePieceModel:
    """Parse a SentencePiece unigram model; ``where`` names it in messages.

    Raises CorruptFile if it is damaged, UnsupportedModel if it is of another kind (BPE).
    """
    pieces: list[tuple[str, float]] = []
    unknown, kind, charsmap = 0, _UNIGRAM, b""
    try:
        # Field numbers of ModelProto: 1 pieces, 2 trainer_spec, 3 normalizer_spec.
        for field, value in _fields(data):
            if field == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                text, score = piece.get(1, b""), piece.get(2, b"\0\0\0\0")
                if not isinstance(text, bytes) or not isinstance(score, bytes):
                    raise ValueError("a piece is no text with a score")
                pieces.append((text.decode("utf-8"), struct.unpack("<f", score)[0]))
            elif field == 2 and isinstance(value, bytes):
                trainer = dict(_fields(value))
                kind, unknown = trainer.get(3, _UNIGRAM), trainer.get(40, 0)  # type: ignore[assignment]
            elif field == 3 and isinstance(value, bytes):
                charsmap = dict(_fields(value)).get(2, b"")  # type: ignore[assignment]
    except (ValueError, struct.error) as err:
        raise CorruptFile(f"The tokenizer in {where} is damaged: {err}. {_BROKEN}") from err
    if kind != _UNIGRAM:
        raise UnsupportedModel(f"{where} is no unigram SentencePiece model, so not umT5's.")
    if not isinstance(unknown, int) or not unknown < len(pieces):
        raise CorruptFile(f"{where} holds {len(pieces)} pieces: not a tokenizer. {_BROKEN}")
    return SentencePieceModel(tuple(pieces), unknown, bytes(charsmap))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protocol buffer message: an int for a varint, else bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7  # wire type: 0 varint, 1 eight bytes, 2 with a length, 5 four bytes
        if wire == 0:
            number, at = _varint(data, at)
            yield tag >> 3, number
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"field of unknown kind {wire} at byte {at:,}")
        if length > len(data) - at:
            raise ValueError(f"a field at byte {at:,} is {length:,} bytes long, beyond the end")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"a number at byte {at:,} does not end")


# Other components without weights ----------------------------------------------------------------


def load_image_processor(path: str | os.PathLike[str] | None = None) -> Any:
    """Return the CLIP image processor of a folder; for None that of ViT-H (224 pixels, bicubic).

    It is the class that diffusers' image-to-video pipeline uses, which needs torchvision. Without
    torchvision it is its counterpart that uses Pillow.
    """
    transformers = _transformers()
    processor = transformers.CLIPImageProcessor if find_spec("torchvision") else _pillow_processor()
    if path is None:
        return processor()
    folder = Path(path)
    if not (folder / "preprocessor_config.json").is_file():
        raise MissingFile(
            f"{quoted(folder / 'preprocessor_config.json')} is missing. Download the image "
            "processor of the model again."
        )
    read_json(folder / "preprocessor_config.json")  # for its own error if the file is damaged
    return processor.from_pretrained(str(folder), local_files_only=True)


def _pillow_processor() -> Any:
    transformers = _transformers()
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ImportError:
        return transformers.CLIPImageProcessor  # before transformers 5 this one used Pillow
    return CLIPImageProcessorPil


def load_scheduler_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the settings in a scheduler folder's ``scheduler_config.json``."""
    folder = Path(path)
    return read_json(folder / "scheduler_config.json" if folder.is_dir() else folder)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as err:
        raise MissingDependency(
            f"transformers cannot be imported ({err}). Install transformers 4.51 or newer."
        ) from err
    return transformers
