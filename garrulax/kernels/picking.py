"""Tables of implementations, and the choice of one."""

import dataclasses
import functools
import importlib
import logging
from typing import Any

import jax

_log = logging.getLogger("garrulax")


@dataclasses.dataclass(frozen=True)
class Table:
    """Implementations of one thing.

    what: the thing, for messages. names: name -> "module:Class". picked: platform -> names, the best first; the last
    computes everything.
    """

    what: str
    names: dict[str, str]
    picked: dict[str, tuple[str, ...]]

    def pick(self, name: Any, *request: Any) -> Any:
        """The implementation of that name, or the first of the platform's that does not refuse the request.

        name: a name, an implementation, or None. What was passed over and why is logged once a reason.
        Raises ValueError for an unknown name and for one that cannot compute the request, with the reason.
        """
        if name is not None:
            chosen = self.implementation(name)
            if reason := chosen.refusal(*request):
                raise ValueError(f"{self.what} {name!r} cannot compute this: {reason}")
            return chosen
        for candidate in self.picked.get(platform(), ("xla",)):
            chosen = self.implementation(candidate)
            reason = chosen.refusal(*request)
            if reason is None:
                return chosen
            _passed_over(self.what, candidate, reason)
        raise RuntimeError(f"no implementation of {self.what} computes this request")

    def implementation(self, name: Any) -> Any:
        """The implementation of a name; others as they are. Raises ValueError for an unknown name."""
        if not isinstance(name, str):
            return name
        if name not in self.names:
            raise ValueError(f"unknown implementation {name!r} of {self.what}: choose from {', '.join(self.names)}")
        module, kind = self.names[name].split(":")
        return getattr(importlib.import_module(module), kind)()


def platform() -> str:
    """What the program that is being traced will run on: "cpu", "tpu", "gpu"."""
    return jax.default_backend()


@functools.cache
def _passed_over(what: str, name: str, reason: str) -> None:
    _log.warning("%s: not %s, because %s", what, name, reason)
