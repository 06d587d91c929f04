"""Registries of implementations, and the choice of one by the device for which a program is compiled."""

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
class Registry:
    """The implementations of one operation.

    Attributes:
        operation: Its name, for messages.
        implementations: Name -> "module:Class"; a class is imported when it is first used.
        preferred: Names to try, the fastest first, by platform ("tpu") or platform and GPU architecture ("gpu sm_90").
            The last one must support every request.
        wrap: Applied to an implementation before it is asked or called, such as `sharded.Sharded`.
        slower: Function from a preferred name and a request to whether that implementation was measured to be slower
            than the next one for such requests. It is then left out; asked for by its name, it is taken.
    """

    operation: str
    implementations: dict[str, str]
    preferred: dict[str, tuple[str, ...]]
    wrap: Callable[[Any], Any] = lambda implementation: implementation
    slower: Callable[..., bool] = lambda name, *request: False

    def pick(self, name: Any, *request: Any) -> Any:
        """The implementation of that name, or else the first preferred one that supports the request.

        The log says once for each reason why a preferred one was skipped.

        Args:
            name: A name, an implementation, or None for the preferred one.
            request: The arguments with which the implementation will be called.

        Raises:
            ValueError: For an unknown name, and for a named implementation that does not support the request.
        """
        if name is not None:
            chosen = self.wrap(self.implementation(name))
            if reason := chosen.unsupported_reason(*request):
                raise ValueError(f"{self.operation} {name!r} cannot compute this: {reason}")
            return chosen
        for candidate in self.candidates(target_device(request)):
            if self.slower(candidate, *request):
                continue
            chosen = self.wrap(self.implementation(candidate))
            reason = chosen.unsupported_reason(*request)
            if reason is None:
                if ".experimental." in self.implementations[candidate]:
                    _warn_experimental(self.operation, candidate)
                return chosen
            _warn_skipped(self.operation, candidate, reason)
        raise RuntimeError(f"no implementation of {self.operation} computes this request")

    def candidates(self, device: Any) -> tuple[str, ...]:
        """Preferred names for a device, the fastest first; those of CPUs for a platform without an entry."""
        where = platform(device)
        for key in (f"{where} {architecture(device)}", where):
            if key in self.preferred:
                return self.preferred[key]
        return self.preferred["cpu"]

    def implementation(self, name: Any) -> Any:
        """The implementation of a name; anything but a string is returned as it is.

        Raises ValueError for an unknown name.
        """
        if not isinstance(name, str):
            return name
        if name not in self.implementations:
            names = ", ".join(self.implementations)
            raise ValueError(f"unknown implementation {name!r} of {self.operation}: choose from {names}")
        module, cls = self.implementations[name].split(":")
        return getattr(importlib.import_module(module), cls)()


def target_device(request: Any) -> Any:
    """The device (real or abstract) for which a program over these arrays is compiled.

    The first that is known of: the mesh in an array's type (also known in ahead-of-time compilation); the device of a
    committed array; the mesh of the context; the default device. Under `jit` without a mesh only the last is known: to
    compile for another device there, set `jax.default_device` or name the implementation.
    """
    arrays = [x for x in jax.tree.leaves(request) if isinstance(x, jax.Array)]
    meshes = [jax.typeof(x).sharding.mesh for x in arrays]
    committed = [d for x in arrays if not isinstance(x, jax.core.Tracer) and x.committed for d in x.devices()]
    for mesh in meshes:
        if not mesh.empty and mesh.abstract_device is not None:
            return mesh.abstract_device
    if committed:
        return committed[0]
    context = jax.sharding.get_abstract_mesh()
    if not context.empty and context.abstract_device is not None:
        return context.abstract_device
    config: Any = jax.config  # its attributes are created at run time, so mypy does not know them
    default = config.jax_default_device
    if isinstance(default, str):
        return jax.devices(default)[0]
    return jax.devices()[0] if default is None else default


def platform(device: Any) -> str:
    """The platform of a device: "cpu", "tpu" or "gpu"."""
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def architecture(device: Any) -> str:
    """The architecture of an NVIDIA GPU: "sm_90" is Hopper, "sm_100" Blackwell; "" if unknown."""
    capability = getattr(device, "compute_capability", None)  # abstract devices have none, only a name
    if capability is not None:
        return f"sm_{str(capability).replace('.', '')}"
    by_name = {r"\bG?H\d": "sm_90", r"\bG?B[12]00\b": "sm_100"}
    return next((result for pattern, result in by_name.items() if re.search(pattern, device.device_kind)), "")


def multiprocessors(device: Any, default: int) -> int:
    """How many multiprocessors a GPU, real or abstract, has; `default` where that is not known."""
    if platform(device) != "gpu":
        return default
    return getattr(device, "core_count", None) or getattr(device, "num_cores", None) or default


@functools.cache  # so that each reason is logged once
def _warn_skipped(operation: str, name: str, reason: str) -> None:
    _log.warning("%s: not %s, because %s", operation, name, reason)


@functools.cache
def _warn_experimental(operation: str, name: str) -> None:
    _log.warning('%s: picked %s, which has never run on a device; implementation="xla" avoids it', operation, name)
