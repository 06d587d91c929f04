"""Tables of implementations, and the choice of one by the device that the program is for."""

import dataclasses
import functools
import importlib
import logging
import re
from collections.abc import Callable
from typing import Any

import jax

_log = logging.getLogger("garrulax")


@dataclasses.dataclass(frozen=True)
class Table:
    """Implementations of one thing.

    what: the thing, for messages. names: name -> "module:Class". picked: a `platform`, or "gpu sm_90" for one
    generation -> names, the best first; the last computes everything. around: what is done to an implementation.
    """

    what: str
    names: dict[str, str]
    picked: dict[str, tuple[str, ...]]
    around: Callable[[Any], Any] = lambda implementation: implementation

    def pick(self, name: Any, *request: Any) -> Any:
        """The implementation of that name, or the first of the device's that does not refuse the request.

        name: a name, an implementation, or None. request: what implementations are called with. What was passed over
        and why is logged once a reason.
        Raises ValueError for an unknown name and for one that cannot compute the request, with the reason.
        """
        if name is not None:
            chosen = self.around(self.implementation(name))
            if reason := chosen.unsupported_reason(*request):
                raise ValueError(f"{self.what} {name!r} cannot compute this: {reason}")
            return chosen
        for candidate in self.candidates(target(request)):
            chosen = self.around(self.implementation(candidate))
            reason = chosen.unsupported_reason(*request)
            if reason is None:
                return chosen
            _passed_over(self.what, candidate, reason)
        raise RuntimeError(f"no implementation of {self.what} computes this request")

    def candidates(self, device: Any) -> tuple[str, ...]:
        """Names for a device, the best first; those of CPUs for a platform that the table does not know."""
        where = platform(device)
        for key in (f"{where} {generation(device)}", where):
            if key in self.picked:
                return self.picked[key]
        return self.picked["cpu"]

    def implementation(self, name: Any) -> Any:
        """The implementation of a name; others as they are. Raises ValueError for an unknown name."""
        if not isinstance(name, str):
            return name
        if name not in self.names:
            raise ValueError(f"unknown implementation {name!r} of {self.what}: choose from {', '.join(self.names)}")
        module, kind = self.names[name].split(":")
        return getattr(importlib.import_module(module), kind)()


def target(request: Any) -> Any:
    """A device like that for which a program over these arrays is compiled: a `jax.Device`, or an abstract one.

    It is, the first that is known: the mesh in an array's type, which programs compiled ahead of time have too; where
    an array lies that was put somewhere; the mesh of the context; the default device. Under `jit` without a mesh only
    the last is known: to compile for another device, name it (`jax.default_device`) or the implementation.
    """
    arrays = [x for x in jax.tree.leaves(request) if isinstance(x, jax.Array)]
    of_types = [jax.typeof(x).sharding.mesh for x in arrays]
    there = [d for x in arrays if not isinstance(x, jax.core.Tracer) and x.committed for d in x.devices()]
    for mesh in of_types:
        if not mesh.empty and mesh.abstract_device is not None:
            return mesh.abstract_device
    if there:
        return there[0]
    context = jax.sharding.get_abstract_mesh()
    if not context.empty and context.abstract_device is not None:
        return context.abstract_device
    config: Any = jax.config  # whose attributes are made at run time
    default = config.jax_default_device
    if isinstance(default, str):
        return jax.devices(default)[0]
    return jax.devices()[0] if default is None else default


def platform(device: Any) -> str:
    """ "cpu", "tpu" or "gpu"."""
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def generation(device: Any) -> str:
    """Of a GPU of NVIDIA's, its architecture: "sm_90" is Hopper, "sm_100" Blackwell; "" where that is not known."""
    capability = getattr(device, "compute_capability", None)  # which abstract devices lack
    if capability is not None:
        return f"sm_{str(capability).replace('.', '')}"
    names = {r"\bG?H\d": "sm_90", r"\bG?B[12]00\b": "sm_100"}
    return next((known for name, known in names.items() if re.search(name, device.device_kind)), "")


@functools.cache
def _passed_over(what: str, name: str, reason: str) -> None:
    _log.warning("%s: not %s, because %s", what, name, reason)
