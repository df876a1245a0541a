"""Attaches the lean forward to a transformer and detaches it again.

The forward of each block and that of the model around them are replaced on the instances; no class
is changed. The replacement acts only in threads that asked for it, other threads get the forward
that was there before. A model that differs in any way from the one that ``forward/block.py``
follows keeps its own forward, and the caller is told the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import Fused, Modulation, TimestepRuns
from ..memory import LEAN_HEAD_GROUPS, LEAN_ROWS
from .animate import (
    FaceBranch,
    adapters_by_block,
    add_pose,
    reads_faces,
    run_adapter,
    why_not_adapter,
)
from .animate2 import DrivenBlock, DrivingStream, DrivingWalk
from .block import LeanOptions, run_block
from .cut import Cut, Exchange
from .replaced import Installed, ReplacedForward, unknown_code
from .sources import ANIMATE, TRANSFORMER, VACE
from .timestep import Embedding, embed_timestep
from .vace import HintBranch, blocks_in_order, run_vace_block

_MAX_RUNS = 8
"""With more runs of equal timesteps the model is given one embedding per token instead."""


def why_not(transformer: Any) -> str | None:
    """Return why the lean forward cannot replace this model's own, or None if it can."""
    from diffusers.models.transformers import transformer_wan, transformer_wan_vace

    reason = _why_not_around(transformer)
    if reason is not None:
        return reason
    code = _module_of(transformer)
    kinds: Mapping[str, tuple[Any, Any]] = {
        "block": (transformer.blocks, code.WanTransformerBlock),
        "VACE block": (_vace_blocks(transformer), transformer_wan_vace.WanVACETransformerBlock),
    }
    for name, (blocks, kind) in kinds.items():
        for index, block in enumerate(blocks):
            reason = _why_not_block(block, kind, code if name == "block" else transformer_wan)
            if reason is not None:
                return f"{name} {index}: {reason}"
    for index, adapter in enumerate(adapters_by_block(transformer).values()):
        hooked = "a diffusers hook is attached" if _hooked(adapter) else None
        reason = hooked or why_not_adapter(adapter)
        if reason is not None:
            return f"face adapter {index}: {reason}"
    return None


def _module_of(transformer: Any) -> Any:
    """Return diffusers' module that has the classes of a transformer's blocks."""
    from diffusers.models import transformers

    if reads_faces(transformer):
        return transformers.transformer_wan_animate
    return transformers.transformer_wan


def _why_not_around(transformer: Any) -> str | None:
    """Return why what is around this model's blocks cannot be replaced, or None if it can."""
    import diffusers

    name, table = "WanTransformer3DModel", TRANSFORMER
    if isinstance(transformer, diffusers.WanVACETransformer3DModel):
        name, table = "WanVACETransformer3DModel", VACE
    elif reads_faces(transformer):
        name, table = "WanAnimateTransformer3DModel", ANIMATE
    reason = unknown_code(transformer, getattr(diffusers, name), transformer, table)
    if reason is not None:
        return reason
    if _hooked(transformer):
        return "a diffusers hook (cache, group offload) is attached to the model"
    return None


def _vace_blocks(transformer: Any) -> Sequence[Any]:
    found: Sequence[Any] = getattr(transformer, "vace_blocks", ())
    return found


def _hooked(module: nn.Module) -> bool:
    """Say whether a diffusers hook acts on this module.

    A registry alone does not mean so: a pipeline that has run leaves an empty one behind.
    """
    registry: Any = getattr(module, "_diffusers_hook", None)
    return registry is not None and bool(registry.hooks)


def _why_not_block(block: Any, kind: Any, code: Any) -> str | None:
    from diffusers.models.attention import FeedForward
    from diffusers.models.normalization import FP32LayerNorm

    if type(block) is not kind:
        return f"it is a {type(block).__name__}"
    if _hooked(block):
        return "a diffusers hook (cache, group offload) is attached"
    if block._compiled_call_impl is not None:
        return "it is compiled"
    for attn in (block.attn1, block.attn2):
        processor: Any = attn.processor
        # diffusers 0.35 cannot split tokens over devices and has no such attribute.
        parallel = getattr(processor, "_parallel_config", None)
        if type(processor) is not code.WanAttnProcessor or parallel is not None:
            return f"its attention is computed by {type(processor).__name__}"
        if getattr(attn, "fused_projections", False):
            return "its projections are fused"
        stored = attn.to_q.weight.dtype  # int8 and uint8 hold quantised weights
        if stored.is_floating_point and attn.norm_q.weight.dtype != stored:
            return "its attention norms have another dtype than its projections"
    if type(block.norm1) is not FP32LayerNorm or type(block.norm3) is not FP32LayerNorm:
        return "its norms are not FP32LayerNorm"
    if type(block.ffn) is not FeedForward or len(block.ffn.net) != 3:
        return "its feed-forward is not diffusers' own"
    return None


@contextmanager
def lean_forward(
    transformer: nn.Module,
    *,
    exact: bool = True,
    rows: int = LEAN_ROWS,
    head_groups: int = LEAN_HEAD_GROUPS,
    fuse: bool = True,
    quick: bool = False,
    eight_bit: bool = False,
    eight_bit_projections: bool = True,
    attention_8bit: bool = False,
) -> Iterator[str | None]:
    """Run ``transformer`` with the lean forward in this thread, inside the ``with`` block.

    Yields None, or the reason why the model keeps its own forward. With ``exact`` the result
    equals diffusers' bit for bit; without it, rounding may differ (see ``forward/block.py``).
    ``quick`` takes the fastest attention, which may round differently; ``eight_bit`` multiplies
    layers that are stored in 8 bit in 8 bit, which changes the result (feed-forwards alone without
    ``eight_bit_projections``); ``attention_8bit``, with ``quick``, lets attention take installed
    kernels that round to 8 bit. The lean forward acts only where gradients are off; each block then
    overwrites its input. Enter the context after offloading has been attached.
    """
    reason = why_not(transformer)
    if reason is not None:
        yield reason
        return
    options = LeanOptions(
        exact=exact, rows=rows, head_groups=head_groups, fuse=fuse, quick=quick,
        eight_bit=eight_bit, eight_bit_projections=eight_bit_projections,
        attention_8bit=attention_8bit,
    )  # fmt: skip
    with _lean(transformer, options):
        yield None


@contextmanager
def cut_tokens(transformer: nn.Module, among: Exchange | None) -> Iterator[None]:
    """Cut this thread's calls of ``transformer`` along its tokens over the processes of ``among``.

    All of them must make the same calls at the same time; each is given the whole result. None
    leaves the model as it is. Raises ValueError where the lean forward is not on (``can_be_cut``),
    or where heads or tokens leave a rest.
    """
    if among is None:
        yield
        return
    installed = _lean.on(transformer)
    options = None if installed is None else installed.mine()
    if options is None or not options.blocks:
        raise ValueError("only the lean forward can be cut over several processes")
    with _lean(transformer, replace(options, cut=Cut(among))):
        yield


def can_be_cut(transformer: nn.Module) -> bool:
    """Say whether the lean forward, which ``cut_tokens`` cuts, is on in this thread.

    Not those of Animate: their faces and driving frames are attended to frame by frame.
    """
    installed = _lean.on(transformer)
    options = None if installed is None else installed.mine()
    plain = type(transformer).__name__ in ("WanTransformer3DModel", "WanVACETransformer3DModel")
    return options is not None and options.blocks and plain


@contextmanager
def hints_in_turn(transformer: nn.Module) -> Iterator[str | None]:
    """Have a VACE model compute each hint just before the block it is for, in this thread.

    The blocks keep diffusers' forward. The result equals diffusers' bit for bit, and 13.1 hidden
    states are alive at 14B instead of 20.1. Other models are left as they are. Yields None, or the
    reason why the model keeps its own forward.
    """
    if not _vace_blocks(transformer):
        yield None
        return
    reason = _why_not_around(transformer)
    if reason is not None:
        yield reason
        return
    with _lean(transformer, LeanOptions(blocks=False)):
        yield None


def _put_on(transformer: Any, installed: Installed[LeanOptions]) -> None:
    last = len(transformer.blocks) - 1
    for index, block in enumerate(transformer.blocks):
        # What is lost in the first and the last block is seen most.
        inner = 0 < index < last
        installed.set_forward(block, functools.partial(_block_forward, block, inner, installed))
    branch = _vace_blocks(transformer)
    for index, block in enumerate(branch):
        inner = 0 < index < len(branch) - 1
        forward = functools.partial(_vace_block_forward, block, inner, installed)
        installed.set_forward(block, forward)
    for adapter in adapters_by_block(transformer).values():
        installed.set_forward(adapter, functools.partial(_adapter_forward, adapter, installed))
    forward = functools.partial(_model_forward, transformer, installed)
    installed.set_forward(transformer, forward)


_lean = ReplacedForward(_put_on)


def _block_forward(
    block: Any,
    inner: bool,
    installed: Installed[LeanOptions],
    before: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor | TimestepRuns,
    rotary_emb: tuple[Tensor, Tensor],
    driven: DrivenBlock | None = None,
) -> Tensor:
    options = installed.mine()
    if options is None or not options.blocks:
        result: Tensor = before(hidden_states, encoder_hidden_states, temb, rotary_emb)
        return result
    if not inner:
        options = replace(options, eight_bit=False)
    fused = _fused(options, hidden_states, block.attn1.heads, temb)
    states = (block, options, hidden_states, encoder_hidden_states, temb, rotary_emb, fused)
    return run_block(*states) if driven is None else driven.through(*states)


def _fused(options: LeanOptions, hidden: Tensor, heads: int, temb: Embedding) -> Fused:
    per_token = not isinstance(temb, TimestepRuns) and temb.ndim == 4
    return options.fused(hidden, heads, per_token=per_token)


def _vace_block_forward(
    block: Any, inner: bool, installed: Installed[LeanOptions], before: Any, *states: Any
) -> tuple[Tensor | None, Tensor]:
    options = installed.mine()
    if options is None or not options.blocks:
        result: tuple[Tensor | None, Tensor] = before(*states)
        return result
    if not inner:
        options = replace(options, eight_bit=False)
    hidden, context, control, temb, rotary = states
    fused = _fused(options, hidden, block.attn1.heads, temb)
    return run_vace_block(block, options, hidden, context, control, temb, rotary, fused)


def _adapter_forward(
    adapter: Any, installed: Installed[LeanOptions], before: Any, hidden: Tensor, tokens: Tensor
) -> Tensor:
    options = installed.mine()
    if options is None or not options.blocks:
        result: Tensor = before(hidden, tokens)
        return result
    return run_adapter(adapter, options, hidden, tokens)


def _model_forward(
    transformer: Any, installed: Installed[LeanOptions], before: Any, *a: Any, **k: Any
) -> Any:
    # Asked at every call: options belong to a thread, and gradients may be on this time.
    options = installed.mine()
    call = _Call.accept(transformer, *a, **k) if options is not None else None
    if options is None or call is None:
        return before(*a, **k)
    state = _State(transformer, options, call)
    # Each block is called as a module, so that hooks which bring its weights still act.
    for index, block in enumerate(blocks_in_order(transformer)):
        state.through(block, index)
    return call.wrap(state.finish())


_PLAIN = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
_CONTROL = ("control_hidden_states", "control_hidden_states_scale")
_FACES = ("pose_hidden_states", "face_pixel_values", "motion_encode_batch_size")


@dataclass(frozen=True)
class _Call:
    """The arguments of one call of the model's forward."""

    hidden_states: Tensor
    timestep: Tensor
    encoder_hidden_states: Tensor
    encoder_hidden_states_image: Tensor | None = None
    control_hidden_states: Tensor | None = None
    control_hidden_states_scale: Tensor | None = None
    pose_hidden_states: Tensor | None = None
    face_pixel_values: Tensor | None = None
    motion_encode_batch_size: int | None = None
    return_dict: bool = True
    driving: DrivingStream | None = None
    """Animate 2's second stream; no model of diffusers' takes it, so that it is refused there."""
    unconditional: bool = False
    """Whether a call with ``driving`` is guidance's unconditional pass."""

    @classmethod
    def accept(cls, transformer: Any, *args: Any, **kwargs: Any) -> _Call | None:
        """Return the call, or None if its arguments need the model's own forward."""
        vace, faces = len(_vace_blocks(transformer)), reads_faces(transformer)
        names = (*_PLAIN, *(_CONTROL if vace else _FACES if faces else ()), "return_dict")
        if kwargs.pop("attention_kwargs", None) is not None or len(args) > len(names):
            return None
        call = cls(**dict(zip(names, args, strict=False)), **kwargs)
        if faces:
            pose = call.pose_hidden_states
            known = pose is not None and call.face_pixel_values is not None
            known = known and call.timestep.ndim == 1
            frames = call.hidden_states.shape[2] - 1
            return call if known and pose is not None and pose.shape[2] == frames else None
        if not vace:
            return call
        # What follows is refused, or not foreseen, by diffusers: its own words are the best.
        scale = call.control_hidden_states_scale
        odd = call.control_hidden_states is None or call.timestep.ndim != 1
        odd = odd or (scale is not None and scale.shape != (vace,))
        return None if odd else call

    def wrap(self, sample: Tensor) -> Any:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample) if self.return_dict else (sample,)


def _runs_of(timestep: Tensor) -> tuple[int, ...] | None:
    """Return at which tokens runs of equal timesteps (B, L) begin.

    None if there are too many runs, or if samples of the batch have different timesteps.
    """
    if timestep.shape[0] > 1 and not bool((timestep == timestep[:1]).all()):
        return None
    changes = (timestep[0, 1:] != timestep[0, :-1]).nonzero().flatten() + 1
    starts = (0, *changes.tolist())
    return starts if len(starts) <= _MAX_RUNS else None


class _State:
    """One call of the model: its conditions, and its hidden states between two blocks."""

    def __init__(
        self, transformer: Any, options: LeanOptions, call: _Call, walk: DrivingWalk | None = None
    ) -> None:
        self._model, self._options = transformer, options
        self._unconditional = call.unconditional
        self.walk = walk
        if call.driving is not None and (walk is None or not walk.stands_for(call.driving)):
            self.walk = DrivingWalk(call.driving, transformer)
        self._grid = call.hidden_states.shape
        self._temb, self._parts, self._context = self._conditions(call)
        self._rotary = transformer.rope(call.hidden_states)
        patched = transformer.patch_embedding(call.hidden_states)
        if call.pose_hidden_states is not None:
            add_pose(transformer, patched, call.pose_hidden_states)
        length, own, cut = patched[0, 0].numel(), slice(None), options.cut
        if cut is not None:
            if self.walk is not None or call.face_pixel_values is not None:
                raise ValueError("Animate's forward cannot be cut over several processes")
            own = cut.own(length)
            self._rotary = cut.rotary(self._rotary)
            self._temb, self._parts = (cut.embedding(e, length) for e in (self._temb, self._parts))
        # A copy of its own, contiguous as in diffusers: the blocks will write into it.
        self.hidden = patched.flatten(2).transpose(1, 2)[:, own].contiguous()
        del patched
        self._hints: HintBranch | None = None
        if call.control_hidden_states is not None:
            scale = call.control_hidden_states_scale
            control = call.control_hidden_states
            self._hints = HintBranch(transformer, control, scale, length, own)
        self._faces: FaceBranch | None = None
        if call.face_pixel_values is not None:
            size = call.motion_encode_batch_size
            self._faces = FaceBranch(transformer, call.face_pixel_values, size)

    def _conditions(self, call: _Call) -> tuple[Embedding, Embedding, Tensor]:
        """Embed timestep, text and image.

        Returns the timestep embedding (one part, for the output norm), its projection (six parts,
        for the blocks) and the context of cross attention.
        """
        embedder, text = self._model.condition_embedder, call.encoder_hidden_states
        # A timestep for each token has few distinct values; where their runs are known, one
        # embedding per run is kept in place of six hidden states.
        starts = _runs_of(call.timestep) if call.timestep.ndim == 2 else None
        temb, parts = embed_timestep(embedder, call.timestep, text, starts, self._options.exact)
        context = embedder.text_embedder(text)
        if call.encoder_hidden_states_image is not None:
            image = embedder.image_embedder(call.encoder_hidden_states_image)
            context = torch.concat([image, context], dim=1)
        return temb, parts, context

    def through(self, block: nn.Module, index: int) -> None:
        """Take the hidden states, or a branch beside them, through one block."""
        if self.walk is not None:
            driven = DrivenBlock(self.walk, index, self._unconditional)
            states = self.hidden, self._context, self._parts, self._rotary
            self.hidden = block(*states, driven=driven)
            return
        hints = self._hints
        if self._faces is not None and block in self._faces:
            self._faces.through(block, self.hidden)
            return
        if hints is not None and block in hints:
            hints.through(block, self.hidden, self._context, self._parts, self._rotary)
            return
        self.hidden = block(self.hidden, self._context, self._parts, self._rotary)
        if hints is not None:
            hints.add_to(self.hidden)

    def finish(self) -> Tensor:
        """Return the prediction (B, channels, frames, height, width)."""
        if self.walk is not None:
            self.walk.end()
        model, hidden = self._model, self.hidden
        table = model.scale_shift_table.to(hidden.device)
        temb = self._temb
        # The table has two parts, shift and scale; both are added to the same embedding.
        both: Embedding
        if isinstance(temb, TimestepRuns):
            both = TimestepRuns(temb.values.expand(-1, -1, 2, -1), temb.starts)
        else:
            both = temb.expand(*temb.shape[:-2], 2, -1)
        fused = _fused(self._options, hidden, model.config.num_attention_heads, both)
        modulation = Modulation(
            table, both, hidden.shape[1], self._options.rows, upcast=False, fused=fused
        )
        out = model.proj_out(modulation.all_normed(model.norm_out, hidden, 0))
        cut = self._options.cut
        return self._unpatched(out if cut is None else cut.whole(out))

    def _unpatched(self, out: Tensor) -> Tensor:
        batch, _, frames, height, width = self._grid
        p_t, p_h, p_w = self._model.config.patch_size
        counts = (frames // p_t, height // p_h, width // p_w)
        out = out.reshape(batch, *counts, p_t, p_h, p_w, -1)
        out = out.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return out.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def run_together(transformer: Any, calls: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Run several calls of the model's forward side by side: each block takes all calls in turn.

    Streamed weights then cross the bus once for all calls (the conditional and the unconditional
    pass of guidance). The results equal those of separate calls bit for bit. Where the lean
    forward is not active in this thread, or a call needs the model's own forward, the calls run
    one after the other.
    """
    installed = _lean.on(transformer)
    options = installed.mine() if installed is not None else None
    # An accelerate hook on the model acts around a whole call of it, which does not happen here.
    if hasattr(transformer, "_hf_hook") or (options is not None and not options.blocks):
        options = None
    accepted = [_Call.accept(transformer, **call) for call in calls] if options else []
    known = [call for call in accepted if call is not None]
    if options is None or len(known) < len(calls):
        results = []
        for given in calls:  # a comprehension's frame would hold the model after an error
            results.append(transformer(**given))
        return results
    states: list[_State] = []
    for call in known:  # calls beside one driving stream share its way through the blocks
        states.append(_State(transformer, options, call, states[-1].walk if states else None))
    # Blocks outside, calls inside: a block's weights are used for every call while they are here.
    for index, block in enumerate(blocks_in_order(transformer)):
        for state in states:
            state.through(block, index)
    return [call.wrap(state.finish()) for call, state in zip(known, states, strict=True)]
