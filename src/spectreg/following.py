"""What a regularizer and a cap have in common: vectors that they follow, and the optimizers that they act with."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectreg.optimizers import Attachment
from spectreg.power_iteration.refusals import refuse_computed
from spectreg.power_iteration.state import State
from spectreg.weights.selection import Weight

VERSION = 1


class Following:
    """An object beside a model that follows the singular vectors of its weights and can be attached to optimizers."""

    NAME: ClassVar[str]  # for errors
    weights: list[Weight]
    _state: State
    _attachment: Attachment | None = None

    def detach(self) -> None:
        """Undo ``attach``; nothing happens if it is not attached."""
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment, self._state.optimizers_of = None, {}

    @torch.no_grad()
    def sigma(self) -> dict[str, Tensor]:
        """The spectral norm of each weight as the last step had it, by name; of several blocks the largest.

        Estimates from below, in the units of the weight; before the first step the warmup is done. Frozen weights are
        left out, as they are from steps.
        """
        return self._state.by_weight(lambda group, _: [s.max() for s in group.vectors.sigmas])

    def state_dict(self) -> dict[str, Any]:
        """Its vectors by the name of the weight, alike on every rank. Safe to save; nothing of the model is in it.

        Of weights that were frozen all along there is only the name.
        """
        return {"version": VERSION, **self._state.save()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, exactly.

        Raises:
            ValueError: It is of another model or format version; says which names are missing or unexpected and
                which shapes differ. Nothing is changed then.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        if version != VERSION:
            raise ValueError(f"this state has format version {version!r}; {VERSION} is understood.")
        self._state.load(state)

    def _attach(self, tie: Callable[[], Attachment], acted_on: list[Weight] | None = None) -> None:
        if self._attachment is not None:
            raise RuntimeError(
                f"this {self.NAME} is attached already: call detach() first, or pass all optimizers at once."
            )
        refuse_computed(self.weights if acted_on is None else acted_on)
        self._attachment = tie()
        self._state.optimizers_of = self._attachment.optimizers_of

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_attachment": None}
