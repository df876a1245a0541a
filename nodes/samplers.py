"""ComfyUI's samplers, read: where each keeps its model, steps, shift, solver and prompts.

A SamplerCustom is given its steps and its solver by nodes beside it, a SamplerCustomAdvanced its
model, prompts and seed too. Does not import ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .native import Prompt, as_link

SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
_SIGMAS = {
    "steps": "sigmas", "scheduler": "sigmas", "denoise": "sigmas", "sampler_name": "sampler",
}  # fmt: skip
_GUIDER = dict.fromkeys(("model", "positive", "negative", "cfg"), "guider")
_BESIDE: dict[str, dict[str, str]] = {
    "SamplerCustom": _SIGMAS,
    "SamplerCustomAdvanced": {**_SIGMAS, **_GUIDER, "noise_seed": "noise"},
}
"""What a sampler does not say itself -> the input from which it is given it."""
_GIVERS = ("BasicScheduler", "KSamplerSelect", "CFGGuider", "RandomNoise")
SOLVERS = {
    "euler": "euler", "uni_pc": "unipc", "dpmpp_2m": "dpm++2m", "lcm": "lcm",
    "res_multistep": "res_multistep",
}  # fmt: skip
_LORAS = ("LoraLoaderModelOnly", "LoraLoader")
_LORA_LIST = "Power Lora Loader (rgthree)"
_FILES = ("unet_name", "ckpt_name", "gguf_name")
"""Inputs of a loader that name the file of a transformer."""
_LOADERS = ("UNETLoader", "UnetLoaderGGUF", "CheckpointLoaderSimple")
"""Those that say nothing else that matters here, but for a weight_dtype."""
_PLANNED = {
    "wananimate2cache": "what is kept of the driving stream is the plan's choice.",
    "lora": "put a Wan LoRA in for each of its LoRAs.",
    "contextwindow": "a Wan Chunked Sampler makes a clip in windows.",
    "cache": "step_cache of a Wan Optimize leaves out steps that differ little.",
    "sage": "which attention is used is the plan's choice; speed of a Wan Optimize allows more.",
    "compile": "how it is computed is the plan's choice.",
    "blockswap": "what waits in RAM is the plan's choice.",
}
"""Words in the names of nodes that change a native model -> what stands for them here."""
_NATIVE_SHIFT = {"WanAnimate2ToVideo": 5.0}
"""What ComfyUI takes for a model without a ModelSamplingSD3, by the node it is made for; else 8."""


class Unlike(Exception):
    """A sampler that is not of the kind that can be made here; its text says why."""


@dataclass
class Model:
    """What leads to a sampler's model input, from the loader on."""

    file: str
    loras: list[tuple[str, float]] = field(default_factory=list)
    shift: float = 8.0
    nodes: list[str] = field(default_factory=list)


class Samplers:
    """Reads the samplers of a prompt; ``say`` is told what is not taken over.

    Its methods raise Unlike for a sampler that cannot be made here.
    """

    def __init__(self, prompt: Prompt, say: Callable[[str], None]) -> None:
        self._prompt, self._say = prompt, say

    def last(self) -> list[str]:
        """Return the samplers whose latents go to no further sampler."""
        nodes = [node for node in self._prompt.nodes if self._prompt.kind(node) in SAMPLERS]
        above = {self._prompt.source(node, "latent_image") for node in nodes}
        inner = {link[0] for link in above if link is not None}
        return [node for node in nodes if node not in inner]

    def foreign(self) -> list[str]:
        """Return nodes that sample, and are none of those that are known here."""
        return [
            node
            for node, one in self._prompt.nodes.items()
            if "Sampler" in (kind := self._prompt.kind(node))
            and kind not in SAMPLERS
            and any(as_link(value) for name, value in one["inputs"].items()
                    if "model" in name or name == "guider")
        ]  # fmt: skip

    def chain(self, last: str) -> list[str]:
        """Return the samplers in their order, one, or two that share the steps of a clip."""
        chain = [last]
        while (above := self._prompt.source(chain[0], "latent_image")) is not None:
            if self._prompt.kind(above[0]) not in SAMPLERS:
                break
            chain.insert(0, above[0])
            if len(chain) > 2:
                raise Unlike(
                    "more than two samplers follow each other. guided_steps of a Wan Generate "
                    "stands for a first one without the distilled LoRAs."
                )
        return chain

    # -- single values ----------------------------------------------------------------------------
    def at(self, node: str, name: str) -> str:
        """Return the node that holds a setting: the sampler, or one that it is given it by."""
        given = _BESIDE.get(self._prompt.kind(node), {}).get(name)
        if given is None:
            return node
        above = self._prompt.source(node, given)
        kind = "" if above is None else self._prompt.kind(above[0])
        if above is None or kind not in _GIVERS:
            raise Unlike(f"its {given} comes from a node that is not known here ({kind}).")
        return above[0]

    def get(self, node: str, name: str) -> Any:
        """Return a setting's plain value, or None."""
        return self._prompt.value(self.at(node, name), name)

    def constant(self, node: str, name: str) -> Any:
        """Return a setting's plain value."""
        found = self.get(node, name)
        if found is None:
            raise Unlike(f"{name} of node {node} comes from a node whose value is not known.")
        return found

    def number(self, node: str, name: str) -> float:
        """Return a number as it was meant: sliders leave 5.000000000000001 in saved workflows."""
        return round(float(self.constant(node, name)), 6)

    def number_or_link(self, node: str, name: str, needed: bool = True) -> Any:
        """Return an input's value, or the link to the node that gives it."""
        node = self.at(node, name)
        found = self._prompt.value(node, name)
        link = self._prompt.source(node, name)
        if found is None and link is not None:
            return list(link)
        if found is None and needed:
            raise Unlike(f"{name} of node {node} is missing.")
        return found

    def _own(self, node: str, name: str) -> float:
        """Return a number above 0, as which our nodes take the model's own."""
        found = self.number(node, name)
        if found == 0:
            raise Unlike(f"{name} of node {node} is 0, which here stands for the model's own.")
        return found

    # -- the model --------------------------------------------------------------------------------
    def model(self, node: str, frame: str) -> Model:
        """Return the file, the LoRAs and the shift that a sampler's model comes with.

        ``frame`` is the node that gives its latents.
        """
        found = Model("")
        at = self._prompt.source(self.at(node, "model"), "model")
        while at is not None and at[0] not in found.nodes:
            name = at[0]
            found.nodes.append(name)
            at = self._prompt.source(name, "model")
            if at is None and (file := self._file(name)) is not None:
                found.file = file
            elif (loras := self._loras(name)) is not None:
                found.loras[:0] = loras
            elif self._prompt.kind(name) != "ModelSamplingSD3":
                self._leave_out(name)
        if not found.file:
            last = found.nodes[-1] if found.nodes else node
            raise Unlike(
                f"its model comes from node {last} ({self._prompt.kind(last)}), which names no "
                "model file that is known here."
            )
        found.shift = self._shift(node) or _NATIVE_SHIFT.get(self._prompt.kind(frame), 8.0)
        return found

    def _file(self, node: str) -> str | None:
        """Return the file that a loader reads, of which nothing else is taken over."""
        found = next((self._prompt.value(node, name) for name in _FILES
                      if name in self._prompt.nodes[node]["inputs"]), None)  # fmt: skip
        if found is None:
            return None
        asked, kind = self._prompt.value(node, "weight_dtype"), self._prompt.kind(node)
        if asked not in (None, "default"):
            self._say(
                f"weight_dtype {asked} of node {node} is left to the plan: weights stay as the "
                "file stores them."
            )
        if kind not in _LOADERS:
            self._say(f"Of node {node} ({kind}) the file is taken over; the rest is the plan's.")
        return str(found)

    def _loras(self, node: str) -> list[tuple[str, float]] | None:
        """Return the LoRAs that a node adds, the first first; None for a node of another kind."""
        kind = self._prompt.kind(node)
        if kind in _LORAS:
            named = str(self.constant(node, "lora_name"))
            pairs = [(named, self.number(node, "strength_model"))]
        elif kind == _LORA_LIST:
            rows = [one for one in self._prompt.nodes[node]["inputs"].values()
                    if isinstance(one, Mapping) and one.get("on") and one.get("lora")]  # fmt: skip
            pairs = [(str(one["lora"]), round(float(one.get("strength", 1)), 6)) for one in rows]
        else:
            return None
        return [(name, strength) for name, strength in pairs if strength and name != "None"]

    def _leave_out(self, node: str) -> None:
        kind = self._prompt.kind(node)
        said = [why for word, why in _PLANNED.items() if word in kind.lower()]
        why = said[0] if said else "it changes a native model only."
        self._say(f"Node {node} ({kind}) is left out: {why}")

    def _shift(self, node: str) -> float | None:
        """Return the flow shift of the steps, which the model given to their node has, or None."""
        at, seen = self._prompt.source(self.at(node, "steps"), "model"), set[str]()
        while at is not None and at[0] not in seen:
            if self._prompt.kind(at[0]) == "ModelSamplingSD3":
                return self._own(at[0], "shift")
            seen.add(at[0])
            at = self._prompt.source(at[0], "model")
        return None

    # -- settings ---------------------------------------------------------------------------------
    def settings(self, chain: list[str], models: list[Model]) -> dict[str, Any]:
        """Return the inputs of a WanGenerate that say how the steps are taken."""
        first, get = chain[0], self.get
        seed = "seed" if self._prompt.kind(first) == "KSampler" else "noise_seed"
        values = {
            "steps": int(self.constant(first, "steps")),
            "guidance_scale": self._own(first, "cfg"),
            "flow_shift": models[0].shift,
            "scheduler": self._solver(first),
            "sigma_schedule": "simple",
            "seed": self.number_or_link(first, seed),
        }
        self._whole(chain)
        for node in chain:
            if self.number(node, "cfg") < 1:
                self._say(f"cfg {get(node, 'cfg'):g} of node {node} is as 1 here: no guidance.")
        if len(chain) == 1:
            return values
        second = chain[1]
        for name in ("steps", "sampler_name", "scheduler"):
            if get(second, name) != get(first, name):
                self._say(
                    f"{name} {get(second, name)} of node {second} is left out: the clip is made "
                    f"with {get(first, name)}, that of the first sampler."
                )
        if models[0].file == models[1].file:
            raise Unlike("its two samplers use the same model file.")
        values["guidance_scale_2"] = self._own(second, "cfg")
        switch = int(self._own(first, "end_at_step"))
        if switch >= values["steps"]:
            raise Unlike("the first of its two samplers makes all steps.")
        if get(second, "start_at_step") != switch:
            self._say(
                f"The second sampler begins at step {get(second, 'start_at_step')}, here with the "
                f"step after the first ends ({switch})."
            )
        values["switch_step"] = switch
        if values["scheduler"] != "euler":
            self._say(
                f"The second sampler begins {values['scheduler']} anew in ComfyUI, and here it "
                "goes on: the clip is a little different."
            )
        if models[1].shift != models[0].shift:
            self._say(f"One flow shift for both experts: {models[0].shift:g}, that of the first.")
        return values

    def _solver(self, node: str) -> str:
        name, schedule = (self.constant(node, one) for one in ("sampler_name", "scheduler"))
        if name not in SOLVERS:
            self._say(f"The sampler {name} is not known here: euler is taken.")
        if schedule != "simple":
            self._say(f"The schedule {schedule} is not known here: simple is taken.")
        return SOLVERS.get(str(name), "euler")

    def _whole(self, chain: list[str]) -> None:
        """Say where samplers make a part of the steps only, or begin with other noise."""
        get, first, last = self.get, chain[0], chain[-1]
        steps, start, end = (
            get(first, "steps"), get(first, "start_at_step"), get(last, "end_at_step"),
        )  # fmt: skip
        whole = get(last, "steps") or steps
        if end is not None and end < whole and get(last, "return_with_leftover_noise") == "enable":
            raise Unlike(f"it ends at step {end} of {whole}, for another sampler to go on.")
        if start not in (None, 0) or (end is not None and end < whole):
            here = f"node {first}" if len(chain) == 1 else f"nodes {first} and {last}"
            self._say(f"All {steps} steps are made; {here} make those from {start} to {end}.")
        if get(first, "add_noise") in ("disable", False):
            self._say(f"The clip begins with noise; node {first} takes its latents as they are.")
        for node in chain[:-1]:
            if get(node, "return_with_leftover_noise") == "disable":
                self._say(f"The noise that node {node} takes away between the samplers stays.")
        for node in chain[1:]:
            if get(node, "add_noise") in ("enable", True):
                self._say(f"The noise that node {node} adds between the samplers is left out.")
        for node in chain:
            if get(node, "denoise") not in (None, 1, 1.0):
                self._say(
                    f"denoise {get(node, 'denoise')} of node {node} is left out: set it in a Wan "
                    "Control."
                )
