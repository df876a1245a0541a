"""ComfyUI's own Wan nodes -> ours: the same files, steps, switch, shift, sampler, seed and sizes.

In: a prompt in API format, in which subgraphs are unfolded and bypassed nodes left out. Out: a
prompt in which each sampler, with what leads to it, is a WanLoader, WanLoRAs and a WanGenerate; all
other nodes are kept, and what could not be taken over is said. Does not import ComfyUI.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..wan_core.errors import InvalidRequest
from .frames import PICTURES, left_out, unpaired, why_not
from .native import Prompt, as_link, read_prompt
from .wired import DEFAULTS

MOST_BYTES, MOST_NODES = 4 * 2**20, 2000
"""Of a prompt that is converted: it may hold long texts, as tracks are."""
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom")
_BESIDE = {
    "steps": "sigmas", "scheduler": "sigmas", "denoise": "sigmas", "sampler_name": "sampler",
}  # fmt: skip
"""What a SamplerCustom does not say itself -> the input from which it is given it."""
_SAMPLERS = {
    "euler": "euler", "uni_pc": "unipc", "dpmpp_2m": "dpm++2m", "lcm": "lcm",
    "res_multistep": "res_multistep",
}  # fmt: skip
_LORAS = ("LoraLoaderModelOnly", "LoraLoader")
_MODELS = {
    "UNETLoader": "unet_name", "UnetLoaderGGUF": "unet_name", "CheckpointLoaderSimple": "ckpt_name",
}  # fmt: skip
_TEXTS = {"CLIPLoader": "clip_name", "CLIPLoaderGGUF": "clip_name"}
_DECODERS = ("VAEDecode", "VAEDecodeTiled")
_KEEPING = "what is kept of the driving stream is the plan's choice."
_PLANNED = {"WanAnimate2Cache": _KEEPING}
"""Nodes that change a native model, and what stands for them here."""
_NATIVE_SHIFT = 8.0
"""What ComfyUI takes for a Wan model without a ModelSamplingSD3."""
IMAGES, VIDEO, LATENT = 0, 1, 2
"""Outputs of WanGenerate."""


class Unlike(Exception):
    """A sampler that is not of the kind that can be made here; its text says why."""


@dataclass
class Model:
    """What leads to a sampler's model input, from the loader on."""

    file: str
    loras: list[tuple[str, float]] = field(default_factory=list)
    shift: float = _NATIVE_SHIFT
    nodes: list[str] = field(default_factory=list)


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
    for last in list(_last_samplers(prompt)):
        try:
            made.take(last)
        except Unlike as error:
            made.say(f"Node {last} ({prompt.kind(last)}) is left as it is: {error}")
    return made.finished()


def _last_samplers(prompt: Prompt) -> Iterator[str]:
    """Return the samplers whose latents go to no further sampler."""
    for node in prompt.nodes:
        if prompt.kind(node) in SAMPLERS and not any(
            prompt.kind(user) in SAMPLERS for user, name, _ in prompt.users(node)
        ):
            yield node


class _Converter:
    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._out: dict[str, Any] = copy.deepcopy(dict(prompt.nodes))
        self._new: list[str] = []
        self._seeds: dict[str, str] = {}
        self._left: list[str] = []
        self._loaders: dict[tuple[Any, ...], str] = {}
        self._rates: dict[str, Any] = {}

    def say(self, text: str) -> None:
        if text not in self._left:
            self._left.append(text)

    # -- one sampler, or two in a row -----------------------------------------------------------
    def take(self, last: str) -> None:
        """Put our nodes in the place of the sampler; raises Unlike before anything is changed."""
        chain = self._chain(last)
        models = [self._model(node) for node in chain]
        two = len(chain) == 2
        frame = self._frame(chain[0])
        values = self._settings(chain, models)
        texts = self._texts(chain[0])
        if two and self._texts(chain[1]) != texts:
            raise Unlike("its two samplers have different prompts.")
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

    def _chain(self, last: str) -> list[str]:
        """Return the samplers in their order, one, or two that share the steps of a clip."""
        chain = [last]
        while (above := self._prompt.source(chain[0], "latent_image")) is not None:
            if self._prompt.kind(above[0]) not in SAMPLERS:
                break
            chain.insert(0, above[0])
            if len(chain) > 2:
                raise Unlike("more than two samplers follow each other.")
        return chain

    def _model(self, node: str) -> Model:
        found = Model("")
        shifts = []
        at = self._prompt.source(node, "model")
        while at is not None:
            name, kind = at[0], self._prompt.kind(at[0])
            if name in found.nodes:
                break
            found.nodes.append(name)
            if kind in _MODELS:
                found.file = str(self._constant(name, _MODELS[kind]))
                self._note_dtype(name)
                break
            if kind == "ModelSamplingSD3":
                shifts.append(self._number(name, "shift"))
            elif kind in _LORAS:
                strength = self._number(name, "strength_model")
                found.loras.insert(0, (str(self._constant(name, "lora_name")), strength))
            else:
                why = _PLANNED.get(kind, "it changes a native model only.")
                self.say(f"Node {name} ({kind}) is left out: {why}")
            at = self._prompt.source(name, "model")
        if not found.file:
            raise Unlike("its model does not come from a model file.")
        found.shift = shifts[0] if shifts else _NATIVE_SHIFT
        return found

    def _note_dtype(self, node: str) -> None:
        asked = self._prompt.value(node, "weight_dtype")
        if asked not in (None, "default"):
            self.say(
                f"weight_dtype {asked} of node {node} is left to the plan: weights stay as the "
                "file stores them."
            )

    def _frame(self, node: str) -> str:
        """Return the node that gives the latents, and with them size and pictures."""
        source = self._prompt.source(node, "latent_image")
        kind = "" if source is None else self._prompt.kind(source[0])
        if source is None or kind not in PICTURES:
            if kind.startswith("Wan"):
                raise Unlike(f"what {kind} prepares is not made by WanFit yet.")
            raise Unlike("its latents do not come from a node of Wan.")
        if (reason := why_not(self._prompt, source[0])) is not None:
            raise Unlike(reason)
        return source[0]

    def _settings(self, chain: list[str], models: list[Model]) -> dict[str, Any]:
        first, get = chain[0], self._get
        seed = "seed" if self._prompt.kind(first) == "KSampler" else "noise_seed"
        values = {
            "steps": int(self._constant(first, "steps")),
            "guidance_scale": self._number(first, "cfg"),
            "flow_shift": models[0].shift,
            "scheduler": self._scheduler(first),
            "sigma_schedule": "simple",
            "seed": self._number_or_link(first, seed),
        }
        self._whole(chain)
        if values["guidance_scale"] != 1 and self._zeroed(chain):
            self.say("An empty negative prompt is encoded, where ComfyUI takes zeros.")
        if len(chain) == 1:
            return values
        second = chain[1]
        for name in ("steps", "sampler_name", "scheduler"):
            if get(second, name) != get(first, name):
                self.say(
                    f"{name} {get(second, name)} of node {second} is left out: the clip is made "
                    f"with {get(first, name)}, that of the first sampler."
                )
        if models[0].file == models[1].file:
            raise Unlike("its two samplers use the same model file.")
        values["guidance_scale_2"] = self._number(second, "cfg")
        switch = self._constant(first, "end_at_step")
        if get(second, "start_at_step") != switch:
            self.say(
                f"The second sampler begins at step {get(second, 'start_at_step')}, here with the "
                f"step after the first ends ({switch})."
            )
        values["switch_step"] = int(switch)
        if values["scheduler"] != "euler":
            self.say(
                f"The second sampler begins {values['scheduler']} anew in ComfyUI, and here it "
                "goes on: the clip is a little different."
            )
        if models[1].shift != models[0].shift:
            self.say(f"One flow shift for both experts: {models[0].shift:g}, that of the first.")
        return values

    def _whole(self, chain: list[str]) -> None:
        """Say where samplers make a part of the steps only, or begin with other noise."""
        get, first, last = self._get, chain[0], chain[-1]
        steps, start, end = (
            get(first, "steps"), get(first, "start_at_step"), get(last, "end_at_step"),
        )  # fmt: skip
        if start not in (None, 0) or (end is not None and end < get(last, "steps")):
            here = f"node {first}" if len(chain) == 1 else f"nodes {first} and {last}"
            self.say(f"All {steps} steps are made; {here} make those from {start} to {end}.")
        if get(first, "add_noise") in ("disable", False):
            self.say(f"The clip begins with noise; node {first} takes its latents as they are.")
        for node in chain[1:]:
            if get(node, "add_noise") in ("enable", True):
                self.say(f"The noise that node {node} adds between the samplers is left out.")
        for node in chain:
            if get(node, "denoise") not in (None, 1, 1.0):
                self.say(
                    f"denoise {get(node, 'denoise')} of node {node} is left out: set it in a Wan "
                    "Control."
                )

    def _zeroed(self, chain: list[str]) -> bool:
        at = self._prompt.above(chain[0], "negative", PICTURES)
        return at is not None and self._prompt.kind(at[0]) == "ConditioningZeroOut"

    def _scheduler(self, node: str) -> str:
        name, schedule = (self._constant(node, one) for one in ("sampler_name", "scheduler"))
        if name not in _SAMPLERS:
            self.say(f"The sampler {name} is not known here: euler is taken.")
        if schedule != "simple":
            self.say(f"The schedule {schedule} is not known here: simple is taken.")
        return _SAMPLERS.get(str(name), "euler")

    # -- what leads to it -----------------------------------------------------------------------
    def _texts(self, node: str) -> dict[str, Any]:
        """Return prompts as text, or wired where they come from other nodes; and the encoder."""
        values: dict[str, Any] = {"text_encoder": None}
        for name, ours, socket in (
            ("positive", "prompt", "positive"), ("negative", "negative_prompt", "negative"),
        ):  # fmt: skip
            at = self._prompt.above(node, name, PICTURES)
            if at is None:
                continue
            if self._prompt.kind(at[0]) == "CLIPTextEncode":
                values[ours] = self._number_or_link(at[0], "text")
                values["text_encoder"] = values["text_encoder"] or self._encoder(at[0])
            elif self._prompt.kind(at[0]) == "ConditioningZeroOut" and name == "negative":
                values |= {ours: "", "official_negative": False}
            else:
                values[socket] = list(at)
        if values.get("negative_prompt") == "":
            values["official_negative"] = False
        return values

    def _encoder(self, node: str) -> str | None:
        at = self._prompt.above(node, "clip", ("LoraLoader",))
        kind = "" if at is None else self._prompt.kind(at[0])
        if kind.startswith("DualCLIP") or (
            at is not None and self._prompt.value(at[0], "type") not in (None, "wan")
        ):
            raise Unlike("its text encoder is not Wan's.")
        if at is None or kind not in _TEXTS:
            return None
        return str(self._prompt.value(at[0], _TEXTS[self._prompt.kind(at[0])]))

    def _vae(self, first: str, last: str, frame: str) -> str | None:
        """Return the VAE's file; that of the decoder, or that of the pictures."""
        users = [user for user, _, _ in self._prompt.users(last)]
        users += [u for user in users for u, _, _ in self._prompt.users(user)]
        decoders = [one for one in users if self._prompt.kind(one) in _DECODERS]
        return next(filter(None, map(self._vae_file, (*decoders, frame))), None)

    def _vae_file(self, node: str) -> str | None:
        at = self._prompt.source(node, "vae")
        if at is None or self._prompt.kind(at[0]) != "VAELoader":
            return None
        return str(self._prompt.value(at[0], "vae_name"))

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
                file = self._prompt.source(at[0], "clip_vision")
                if file is not None and self._prompt.kind(file[0]) == "CLIPVisionLoader":
                    return str(self._prompt.value(file[0], "clip_name"))
        return None

    def _sizes(self, frame: str) -> dict[str, Any]:
        for text in left_out(self._prompt, frame):
            self.say(text)
        names = {"width": "width", "height": "height", "length": "num_frames"}
        return {ours: self._number_or_link(frame, name) for name, ours in names.items()}

    def _pictures(self, frame: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        control: dict[str, Any] = {}
        alone = unpaired(self._prompt, frame)
        for name, ours in PICTURES[self._prompt.kind(frame)].items():
            if name == alone:
                self.say(f"{name} of node {frame} is left out: it takes a video and its mask.")
                continue
            given = self._number_or_link(frame, name, needed=False)
            if given is None or (ours == "control.strength" and given == 1):
                continue
            place, _, key = ours.rpartition(".")
            (control if place else values)[key] = given
        if control:
            values["control"] = self._add("WanControl", **control)
        return values

    # -- the new prompt -------------------------------------------------------------------------
    def _at(self, node: str, name: str) -> str:
        """Return the node that holds a setting: the sampler, or what a SamplerCustom is given."""
        if self._prompt.kind(node) != "SamplerCustom" or name not in _BESIDE:
            return node
        above = self._prompt.source(node, _BESIDE[name])
        if above is None or self._prompt.kind(above[0]) not in ("BasicScheduler", "KSamplerSelect"):
            raise Unlike("its sampler or its sigmas come from a node that is not known here.")
        return above[0]

    def _get(self, node: str, name: str) -> Any:
        """Return a setting's plain value, or None."""
        return self._prompt.value(self._at(node, name), name)

    def _constant(self, node: str, name: str) -> Any:
        found = self._get(node, name)
        if found is None:
            raise Unlike(f"{name} of node {node} comes from a node whose value is not known.")
        return found

    def _number(self, node: str, name: str) -> float:
        """Return a number as it was meant: sliders leave 5.000000000000001 in saved workflows."""
        return round(float(self._constant(node, name)), 6)

    def _number_or_link(self, node: str, name: str, needed: bool = True) -> Any:
        """Return an input's value, or the link to the node that gives it."""
        found = self._prompt.value(node, name)
        link = self._prompt.source(node, name)
        if found is None and link is not None:
            return list(link)
        if found is None and needed:
            raise Unlike(f"{name} of node {node} is missing.")
        return found

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
        for node in self._after(last, ("TrimVideoLatent",)):
            for user, name, _ in self._prompt.users(node):
                kind = self._prompt.kind(user)
                if kind == "TrimVideoLatent" or (kind in _DECODERS and self._is_ours(user, vae)):
                    continue
                self._out[user]["inputs"][name] = [sampler, LATENT]
            for decoder in self._after(node, _DECODERS)[1:]:
                if self._is_ours(decoder, vae):
                    self._use_pictures(decoder, sampler, inputs)

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
            fps = self._number_or_link(user, "fps", needed=False)
            if fps is not None:
                inputs["fps"] = self._rates.setdefault(sampler, fps)
            if fps is not None and inputs["fps"] != fps:
                self.say(f"fps {fps} of node {user} is left out: one rate for all its videos.")
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
            return Conversion(dict(self._prompt.nodes), [], [], {}, self._left)
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
        return Conversion(kept, self._new, removed, self._seeds, self._left)
