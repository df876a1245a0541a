"""Applies a plan to one component for the length of a ``with`` block, then undoes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..decoding import lean_decoder, lean_encoder
from ..forward import hints_in_turn, lean_forward
from ..loading import all_pinned_bytes
from ..memory import BANDS, MATRIX_UNITS, Strip, pinned_budget_now
from .offload import place
from .sharing import Sharing
from .streaming import stream_blocks

if TYPE_CHECKING:
    from ..plan import OptimizationPlan


@contextmanager
def apply_plan(
    module: Any,
    component: str,
    plan: OptimizationPlan,
    *,
    decoding: bool = True,
    check: Callable[[], object] = lambda: None,
    sharing: Sharing | None = None,
    strip: Strip | None = None,
) -> Iterator[str | None]:
    """Have one component compute as ``plan`` says, inside the ``with`` block.

    ``component`` is its name in the plan ("transformer_2", "vae" …). ``decoding=False`` is for a
    VAE that encodes: the lean encoder is then attached in place of the decoder. With ``sharing`` a
    gang streams weights together; with ``strip`` a VAE decodes that part of a picture. Yields None,
    or a sentence saying what could not be carried out. Afterwards the module's parameters are the
    same objects with the same values as before.
    """
    with ExitStack() as stack:
        # Weights first: the lean forwards below are attached to a module that is in its place, and
        # they are taken off again before the weights leave.
        stack.enter_context(_placed(module, component, plan, check, sharing))
        why_not = None
        if plan.choices.lean and component.startswith("transformer"):
            forward = lean_forward(
                module,
                exact=not plan.choices.by_rows,
                quick=plan.choices.quick,
                eight_bit=plan.choices.eight_bit and _stored_in_8_bit(module),
                attention_8bit=plan.choices.attention_8bit,
            )
            why_not = stack.enter_context(forward)
        elif component.startswith("transformer") and not plan.choices.hints_at_once(component):
            why_not = stack.enter_context(hints_in_turn(module))
        elif component == "vae" and plan.choices.lean_vae:
            why_not = stack.enter_context(_lean_vae(module, plan, decoding, strip))
        yield f"More memory than predicted in {component}: {why_not}" if why_not else None


def _stored_in_8_bit(module: Any) -> bool:
    """Say whether any layer is stored as products in 8 bit take it: of a pair one expert may be."""
    stored = (getattr(layer, "stored", None) for layer in module.modules())
    return any(one is not None and one.kind in MATRIX_UNITS for one in stored)


def _lean_vae(
    vae: Any, plan: OptimizationPlan, decoding: bool, strip: Strip | None
) -> AbstractContextManager[str | None]:
    """Return the context of a lean decode or encode."""
    bands = BANDS if plan.choices.by_rows else None
    # Where the feature cache rests in RAM, page-locking it is what keeps its trips over the bus
    # short, so it shares the budget of the streamed weights.
    away = plan.choices.by_rows or plan.choices.cache_in_ram
    pin_bytes = pin_budget(plan) if away else 0
    wishes: Any = {"bands": bands, "cache_on_host": away, "pin_bytes": pin_bytes}
    wishes["quick"] = plan.choices.quick
    return lean_decoder(vae, **wishes, strip=strip) if decoding else lean_encoder(vae, **wishes)


def _placed(
    module: Any,
    component: str,
    plan: OptimizationPlan,
    check: Callable[[], object],
    sharing: Sharing | None,
) -> AbstractContextManager[Any]:
    """Return the context that places a component: whole, leaf by leaf, or block by block."""
    mode = plan.choices.offload_of(component)
    if mode != "stream":
        return place(module, mode, plan.device, check)
    resident, buffers = plan.blocks_and_buffers(component)
    return stream_blocks(
        module,
        plan.device,
        resident_blocks=resident,
        buffers=buffers,
        pin_bytes=pin_budget(plan),
        sharing=sharing,
        check=check,
    )


def pin_budget(plan: OptimizationPlan) -> int:
    """Return how many bytes of RAM this process may page-lock, including what it has locked."""
    return plan.pin_bytes(pinned_budget_now(all_pinned_bytes()))
