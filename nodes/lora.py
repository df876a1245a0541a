"""WanLoRA: adds one LoRA to a model; several nodes in a row add several."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io, ui

from ..wan_core import config
from ..wan_core.config import EXPERTS
from ..wan_core.errors import InvalidRequest
from . import bridge
from .files import absent_lora
from .inputs import Pipeline, pipeline_input
from .job import require_choice, require_kind
from .pipeline import WanPipeline, fingerprint, fingerprint_of, require_pipeline
from .words import in_words_of_the_nodes, said_in_words_of_the_nodes

NOTHING_FOUND = "(no LoRA found)"


class WanLoRA(io.ComfyNode):  # type: ignore[misc]
    """Returns a new WAN_PIPELINE with a LoRA added; its header is checked, nothing is loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanLoRA",
            display_name="Wan LoRA",
            category="WanFit",
            description="Adds a LoRA to a Wan model. It is checked here, applied while the model "
            "works, and leaves no trace in its weights.",
            inputs=[
                pipeline_input(),
                io.Combo.Input(
                    "lora",
                    options=bridge.lora_names() or [NOTHING_FOUND],
                    tooltip="A .safetensors file below models/loras, in any of the usual styles.",
                ),
                io.Combo.Input(
                    "expert",
                    options=list(EXPERTS),
                    default="both",
                    tooltip="Which expert of a Wan 2.2 A14B it works on: high-noise files go to "
                    "high, low-noise files to low. Other models have one transformer: both.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How strongly it works. 0 leaves it out, below 0 inverts it.",
                ),
                io.Boolean.Input(
                    "use_recipe",
                    default=False,
                    tooltip="For a LoRA distilled to a few steps (lightx2v, rCM, FastWan, "
                    "CausVid): its settings stand for the official ones, that is, wherever a "
                    "sampler's input is 0 or its first choice.",
                ),
            ],
            outputs=[
                Pipeline.Output(
                    "with_lora", display_name="pipeline", tooltip="The same model with this LoRA."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, lora: str | None = None) -> bool | str:
        """Return True, or that the LoRA file that a saved workflow names does not exist.

        None stands for a name that another node gives, which is not known yet.
        """
        return True if lora is None or bridge.lora_path(lora) is not None else _absent(lora)

    @classmethod
    def fingerprint_inputs(cls, lora: str | None = None, **_: object) -> str:
        """Return a text that changes when the file is changed or replaced."""
        if lora is None:  # another node gives it: any file might be meant
            paths = map(bridge.lora_path, bridge.lora_names())
            return fingerprint_of("", [path for path in paths if path is not None])
        path = bridge.lora_path(lora)
        if path is None:
            return f"absent: {lora}"
        # PEFT keeps the scale of a LoRA in a file of its own.
        return f"{fingerprint(path)} {fingerprint(path.with_name('adapter_config.json'))}"

    @classmethod
    def execute(
        cls, pipeline: WanPipeline, lora: str, expert: str, strength: float, use_recipe: bool
    ) -> io.NodeOutput:
        require_choice("expert", expert, EXPERTS)
        path = bridge.lora_path(require_kind("lora", lora, NOTHING_FOUND))
        if path is None:
            raise InvalidRequest(_absent(lora), field="lora")
        pipeline = require_pipeline(pipeline)
        with said_in_words_of_the_nodes():
            added = pipeline.with_lora(config.WanLoRA(str(path), expert, strength), use_recipe)
        text = in_words_of_the_nodes(describe(pipeline, added))
        return io.NodeOutput(added, ui=ui.PreviewText(text))


def _absent(name: str) -> str:
    return absent_lora(name, bridge.lora_names())


def describe(before: WanPipeline, after: WanPipeline) -> str:
    """Say what was added, the settings that a distilled LoRA needs, and the new warnings."""
    found = after.architecture.loras[-1]
    known = set(before.architecture.warnings)
    lines = [f"! {text}" for text in after.architecture.warnings if text not in known]
    lines.append(found.describe())
    if found.recipe is not None:
        used = "used where a sampler's input is 0" if after.use_recipe else "not used"
        lines.append(f"- {Path(found.lora.path).name} is {found.recipe.describe()}; {used}")
    return "\n".join(lines)
