"""ComfyUI's own Wan nodes -> ours: the same files, steps, switch, shift, sampler, seed and sizes.

In: a prompt in API format, in which subgraphs are unfolded and bypassed nodes left out. Out: a
prompt in which each sampler, with what leads to it, is a WanLoader, WanLoRAs and a WanGenerate; all
other nodes are kept, and what could not be taken over is said. Does not import ComfyUI.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..wan_core.errors import InvalidRequest
from .frames import PICTURES, left_out, scaling, unpaired, why_not
from .native import Link, Prompt, as_link, read_prompt
from .samplers import Model, Samplers, Unlike
from .wired import DEFAULTS

MOST_BYTES, MOST_NODES = 4 * 2**20, 2000
"""Of a prompt that is converted: it may hold long texts, as tracks are."""
_ENCODERS = ("CLIPLoader", "CLIPLoaderGGUF", "CheckpointLoaderSimple")
_VAES = ("VAELoader", "CheckpointLoaderSimple")
_MORE_THAN_TEXT = (
    "ConditioningCombine", "ConditioningSetTimestepRange", "ConditioningSetArea",
    "ConditioningSetAreaPercentage", "ConditioningSetAreaPercentageVideo",
    "ConditioningSetAreaStrength", "ConditioningSetMask", "ControlNetApply",
    "ControlNetApplyAdvanced",
)  # fmt: skip
"""Nodes whose texts are several, or hold for a part of the clip: the samplers here refuse them."""
_DECODERS = ("VAEDecode", "VAEDecodeTiled")
_WEIGHTS = re.compile(r"(?<!\\)\([^()]*\)|\\[()]")
"""Words in brackets, and brackets that are escaped because of that."""
IMAGES, VIDEO, LATENT = 0, 1, 2
"""Outputs of WanGenerate."""


@dataclass
class Conversion:
    """The converted prompt, and what is new, gone and left out in it."""

    prompt: dict[str, Any]
    new: list[str]
    removed: list[str]
    seeds: dict[str, str]
    """Our samplers -> the nodes whose seed they took, for what becomes of it after a run."""
    left: list[str]


def answer(body: bytes) -> tuple[int, dict[str, Any]]:
    """Return an HTTP status and a JSON object for a page's request; never raises."""
    try:
        asked = json.loads(body)
        prompt = read_prompt(asked.get("prompt") if isinstance(asked, dict) else None, MOST_NODES)
    except InvalidRequest as error:
        return 400, {"ok": False, "error": str(error)}
    except (ValueError, RecursionError):
        return 400, {"ok": False, "error": "The request is not JSON."}
    # The boundary of the route: a prompt that no test thought of must not fill the log.
    try:
        return 200, {"ok": True, **asdict(convert(prompt))}
    except Exception as error:  # noqa: BLE001
        text = f"The workflow could not be converted ({type(error).__name__}: {error})."
        return 500, {"ok": False, "error": text[:500]}


def convert(prompt: Prompt) -> Conversion:
    """Convert every sampler of a prompt that is of a Wan model."""
    made = _Converter(prompt)
    for last in made.samplers.last():
        said = len(made.left)
        try:
            made.take(last)
        except Unlike as error:
            del made.left[said:]  # of a sampler that stays nothing is left out
            made.say(f"Node {last} ({prompt.kind(last)}) is left as it is: {error}")
    for node in made.samplers.foreign():
        made.say(f"Node {node} ({prompt.kind(node)}) is left as it is: it is not known here.")
    return made.finished()


class _Converter:
    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._out: dict[str, Any] = copy.deepcopy(dict(prompt.nodes))
        self._new: list[str] = []
        self._seeds: dict[str, str] = {}
        self.left: list[str] = []
        self.samplers = Samplers(prompt, self.say)
        self._cropped: dict[tuple[Any, ...], list[Any]] = {}
        self._loaders: dict[tuple[Any, ...], str] = {}
        self._rates: dict[str, Any] = {}

    def say(self, text: str) -> None:
        if text not in self.left:
            self.left.append(text)

    # -- one sampler, or two in a row -----------------------------------------------------------
    def take(self, last: str) -> None:
        """Put our nodes in the place of the sampler; raises Unlike before anything is changed."""
        chain = self.samplers.chain(last)
        frame = self._frame(chain[0])
        models = [self.samplers.model(node, frame) for node in chain]
        two = len(chain) == 2
        values = self.samplers.settings(chain, models)
        texts = self._texts(chain[0], frame)
        if two and self._texts(chain[1], frame) != texts:
            raise Unlike("its two samplers have different prompts.")
        if values["guidance_scale"] != 1 and self._zeroed(chain):
            self.say("An empty negative prompt is encoded, where ComfyUI takes zeros.")
        # All that may be refused is looked at before anything is added.
        values |= self._sizes(frame)
        vae = self._vae(chain[0], last, frame)
        encoder = texts.pop("text_encoder") or ("none" if "positive" in texts else "auto")
        source = self._loader(models, encoder, vae, frame)
        for model, expert in zip(models, ("high", "low") if two else ("both",), strict=True):
            for name, strength in model.loras:
                values_of = {"lora": name, "strength": strength, "expert": expert}
                source = self._add("WanLoRA", pipeline=source, **values_of)
        values |= texts | self._pictures(frame)
        sampler = self._add("WanGenerate", pipeline=source, **values)[0]
        self._seeds[sampler] = chain[0]
        self._rewire(last, sampler, vae)

    def _frame(self, node: str) -> str:
        """Return the node that gives the latents, and with them size and pictures."""
        source = self._prompt.source(node, "latent_image")
        kind = "" if source is None else self._prompt.kind(source[0])
        if source is None or kind in ("", "EmptyLatentImage"):
            raise Unlike("its latents do not come from a node of Wan.")
        if kind.startswith("VAEEncode"):
            raise Unlike(
                f"it begins with pictures that node {source[0]} ({kind}) encodes. Wire them to the "
                "video of a Wan Control and set its denoise."
            )
        if self._prompt.source(source[0], "samples") is not None:
            raise Unlike(f"it goes on from latents that node {source[0]} ({kind}) gives.")
        if kind not in PICTURES:
            raise Unlike(f"what {kind} prepares is not made by WanFit.")
        if (reason := why_not(self._prompt, source[0])) is not None:
            raise Unlike(reason)
        return source[0]

    def _zeroed(self, chain: list[str]) -> bool:
        at = self._text(chain[0], "negative", None)
        return at is not None and self._prompt.kind(at[0]) == "ConditioningZeroOut"

    # -- what leads to it -----------------------------------------------------------------------
    def _text(self, node: str, name: str, frame: str | None) -> Link | None:
        """Return what gives a sampler's text, past the node that gives its latents."""
        passed: list[str] = []
        at = self._prompt.source(self.samplers.at(node, name), name)
        while at is not None and self._prompt.kind(at[0]) in PICTURES and at[0] not in passed:
            passed.append(at[0])
            at = self._prompt.source(at[0], name)
        if frame is None:
            return at
        other = next((one for one in passed if one != frame), None)
        if other is not None:
            raise Unlike(
                f"its {name} comes from node {other} ({self._prompt.kind(other)}) and its latents "
                f"from node {frame} ({self._prompt.kind(frame)}): one of them must give both."
            )
        given = self._prompt.source(frame, name) is not None and PICTURES[self._prompt.kind(frame)]
        if at is not None and not passed and given:
            raise Unlike(
                f"its {name} comes from node {at[0]} ({self._prompt.kind(at[0])}) and not from "
                f"node {frame}, whose pictures it needs."
            )
        return at

    def _texts(self, node: str, frame: str) -> dict[str, Any]:
        """Return prompts as text, or wired where they come from other nodes; and the encoder."""
        values: dict[str, Any] = {"text_encoder": None}
        found = {name: self._text(node, name, frame) for name in ("positive", "negative")}
        weighted = [at[0] for at in found.values() if at is not None and self._is_weighted(at[0])]
        for at in weighted:
            self.say(f"Node {at} stays: it weights the words in brackets, which here are text.")
        for socket, ours in (("positive", "prompt"), ("negative", "negative_prompt")):
            at = found[socket]
            kind = "" if at is None else self._prompt.kind(at[0])
            if at is None:
                continue
            if kind in _MORE_THAN_TEXT:
                raise Unlike(
                    f"its {socket} comes from node {at[0]} ({kind}); here one text holds for the "
                    "whole clip."
                )
            if kind == "CLIPTextEncode" and not weighted:
                values[ours] = self.samplers.number_or_link(at[0], "text")
                encoder = self._encoder(at[0])
                values["text_encoder"] = values["text_encoder"] or encoder
                if encoder not in (None, values["text_encoder"]):
                    self.say(f"The text encoder {encoder} is left out: one encodes both texts.")
            elif kind == "ConditioningZeroOut" and socket == "negative":
                values |= {ours: "", "official_negative": False}
            else:
                values[socket] = list(at)
        if values.get("negative_prompt") == "":
            values["official_negative"] = False
        return values

    def _is_weighted(self, node: str) -> bool:
        text = self._prompt.value(node, "text")
        weighted = isinstance(text, str) and _WEIGHTS.search(text) is not None
        return weighted and self._prompt.kind(node) == "CLIPTextEncode"

    def _encoder(self, node: str) -> str | None:
        at = self._prompt.above(node, "clip", ("LoraLoader",))
        kind = "" if at is None else self._prompt.kind(at[0])
        if kind.startswith("DualCLIP") or (
            at is not None and self._prompt.value(at[0], "type") not in (None, "wan")
        ):
            raise Unlike("its text encoder is not Wan's.")
        return None if at is None else self._named(at[0], "clip_name", "text encoder", _ENCODERS)

    def _named(self, node: str, name: str, what: str, known: tuple[str, ...]) -> str | None:
        """Return the file that a loader names; None, which finds one, is said of strange ones."""
        found, kind = self._prompt.value(node, name), self._prompt.kind(node)
        if found is None and kind not in known:
            self.say(f"The {what} of node {node} ({kind}) is left out: here it is found by itself.")
        return None if found is None else str(found)

    def _vae(self, first: str, last: str, frame: str) -> str | None:
        """Return the VAE's file; that of the decoder, or that of the pictures."""
        users = [user for user, _, _ in self._prompt.users(last)]
        users += [u for user in users for u, _, _ in self._prompt.users(user)]
        decoders = [one for one in users if self._prompt.kind(one) in _DECODERS]
        return next(filter(None, map(self._vae_file, (*decoders, frame))), None)

    def _vae_file(self, node: str) -> str | None:
        at = self._prompt.source(node, "vae")
        return None if at is None else self._named(at[0], "vae_name", "VAE", _VAES)

    def _loader(self, models: list[Model], encoder: str, vae: str | None, frame: str) -> list[Any]:
        low = models[1].file if len(models) == 2 else "none"
        files = {
            "model": models[0].file,
            "low_noise_model": low,
            "text_encoder": encoder,
            "vae": vae or "auto",
            "image_encoder": self._image_encoder(frame) or "auto",
        }
        key = tuple(files.values())
        if key not in self._loaders:
            self._loaders[key] = self._add("WanLoader", **files)[0]
        return [self._loaders[key], 0]

    def _image_encoder(self, frame: str) -> str | None:
        for name in ("clip_vision_output", "clip_vision_start_image"):
            at = self._prompt.source(frame, name)
            if at is not None and self._prompt.kind(at[0]) == "CLIPVisionEncode":
                self._say_seen(frame, at[0])
                file = self._prompt.source(at[0], "clip_vision")
                if file is not None and self._prompt.kind(file[0]) == "CLIPVisionLoader":
                    return str(self._prompt.value(file[0], "clip_name"))
        return None

    def _say_seen(self, frame: str, encode: str) -> None:
        """Say where a native image encoder sees something else than ours, the clip's picture."""
        if self._prompt.value(encode, "crop") == "none":
            self.say(
                f"Node {encode} shows the image encoder the whole picture, squeezed; here it sees "
                "the middle of it."
            )
        seen = self._prompt.source(encode, "image")
        given = [self._prompt.source(frame, name) for name in PICTURES[self._prompt.kind(frame)]]
        if seen is not None and seen not in given:
            self.say(
                f"Node {encode} shows the image encoder what node {seen[0]} gives; here it sees "
                "the start image or the reference."
            )

    def _sizes(self, frame: str) -> dict[str, Any]:
        for text in left_out(self._prompt, frame):
            self.say(text)
        names = {"width": "width", "height": "height", "length": "num_frames"}
        values = {ours: self.samplers.number_or_link(frame, name) for name, ours in names.items()}
        length = values["num_frames"]
        if isinstance(length, int):  # of 4n+2 to 4n+4 frames ComfyUI makes 4n+1
            values["num_frames"] = (length - 1) // 4 * 4 + 1
        return values

    def _pictures(self, frame: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        control: dict[str, Any] = {}
        alone = unpaired(self._prompt, frame)
        for name, ours in PICTURES[self._prompt.kind(frame)].items():
            if name == alone:
                self.say(f"{name} of node {frame} is left out: it takes a video and its mask.")
                continue
            given = self.samplers.number_or_link(frame, name, needed=False)
            if given is None or (ours == "control.strength" and given == 1):
                continue
            how = scaling(self._prompt, frame, name)
            place, _, key = ours.rpartition(".")
            (control if place else values)[key] = given if how is None else self._crop(given, how)
        if control:
            values["control"] = self._add("WanControl", **control)
        return values

    def _crop(self, picture: list[Any], scaling: Mapping[str, Any]) -> list[Any]:
        """Have the middle of a picture cut out, as ComfyUI's nodes do; ours would stretch it."""
        key = (tuple(picture), repr(scaling))
        if key not in self._cropped:
            self._cropped[key] = self._add("ImageScale", image=picture, crop="center", **scaling)
        return self._cropped[key]

    # -- the new prompt -------------------------------------------------------------------------
    def _add(self, kind: str, **values: Any) -> list[Any]:
        """Add one of our nodes; returns the link to its first output."""
        name = f"wanfit{len(self._new) + 1}"
        # None is what the user prefers: the node knows it.
        usual = {name: one for name, one in DEFAULTS.get(kind, {}).items() if one is not None}
        inputs = {**usual, **values}
        self._out[name] = {"class_type": kind, "inputs": inputs}
        self._new.append(name)
        return [name, 0]

    def _rewire(self, last: str, sampler: str, vae: str | None) -> None:
        """Have what used the latents, pictures and video of the old sampler use those of ours.

        A decoder with another VAE than ours, as for transparency, stays and decodes our latents.
        """
        inputs = self._out[sampler]["inputs"]
        trimmed = self._trimmed(last)
        for node in trimmed:
            for user, name, _ in self._prompt.users(node):
                ours = self._prompt.kind(user) in _DECODERS and self._is_ours(user, vae)
                if user in trimmed or ours:
                    continue
                self._out[user]["inputs"][name] = [sampler, LATENT]
            for decoder in self._after(node, _DECODERS)[1:]:
                if self._is_ours(decoder, vae):
                    self._use_pictures(decoder, sampler, inputs)

    def _trimmed(self, last: str) -> list[str]:
        """Return a sampler and what only cuts off its references, which ours does not give."""
        found = self._after(last, ("TrimVideoLatent",))
        cuts = {node: self._prompt.source(node, "trim_amount") for node in found[1:]}
        kept = [node for node, cut in cuts.items() if cut and self._prompt.kind(cut[0]) in PICTURES]
        return [last, *kept]

    def _is_ours(self, decoder: str, vae: str | None) -> bool:
        return self._vae_file(decoder) in (None, vae)

    def _use_pictures(self, decoder: str, sampler: str, inputs: dict[str, Any]) -> None:
        for user, name, slot in self._prompt.users(decoder):
            if self._hands_on(user, name, (decoder, slot)):
                self._use_pictures(user, sampler, inputs)
                continue
            if self._prompt.kind(user) != "CreateVideo":
                self._out[user]["inputs"][name] = [sampler, IMAGES]
                continue
            fps = self.samplers.number_or_link(user, "fps", needed=False)
            if fps is not None:
                inputs["fps"] = self._rates.setdefault(sampler, fps)
            if fps is not None and inputs["fps"] != fps:
                self.say(f"fps {fps} of node {user} is left out: one rate for all its videos.")
            if self._prompt.value(user, "bit_depth") == 10:
                inputs["pix_fmt"] = "yuv420p10le"
            audio = self._prompt.source(user, "audio")
            if audio is not None:
                inputs["audio"] = list(audio)
            for viewer, field_name, _ in self._prompt.users(user):
                self._out[viewer]["inputs"][field_name] = [sampler, VIDEO]

    def _hands_on(self, node: str, name: str, pictures: tuple[str, int]) -> bool:
        """Say whether a node only hands the pictures on: a switch, a batch of these alone, or one
        that cuts off what a native clip has in front and ours has not."""
        kind, inputs = self._prompt.kind(node), self._prompt.nodes[node]["inputs"]
        if kind == "ImageFromBatch":
            cut = self._prompt.source(node, "batch_index")
            return name == "image" and cut is not None and self._prompt.kind(cut[0]) in PICTURES
        if kind == "ComfySwitchNode":
            return self._prompt.passed((node, 0)) == pictures
        links = [one for one in map(as_link, inputs.values()) if one is not None]
        return kind == "BatchImagesNode" and links == [pictures]

    def _after(self, node: str, kinds: tuple[str, ...]) -> list[str]:
        """Return a node and those of the kinds that take its output, one after the other."""
        found = [node]
        for one in found:
            users = [user for user, _, _ in self._prompt.users(one) if user not in found]
            found += [user for user in users if self._prompt.kind(user) in kinds]
        return found

    def finished(self) -> Conversion:
        """Leave out what nothing uses any more, and return the prompt."""
        if not self._new:
            self.say("Nothing was changed: no sampler of a Wan model was found that can be made.")
            return Conversion(dict(self._prompt.nodes), [], [], {}, self.left)
        ends = [node for node in self._out if not self._prompt.users(node)] + self._new
        needed: set[str] = set()
        while ends:
            node = ends.pop()
            if node in needed or node not in self._out:
                continue
            needed.add(node)
            links = map(as_link, self._out[node]["inputs"].values())
            ends += [link[0] for link in links if link is not None]
        removed = [node for node in self._prompt.nodes if node not in needed]
        kept = {node: one for node, one in self._out.items() if node in needed}
        return Conversion(kept, self._new, removed, self._seeds, self.left)
