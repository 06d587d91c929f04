"""Processes that watch each other: who ends without a word, or is silent, is named."""

import queue
import socket

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from garrulax.train import agreement, peers
from garrulax.train.settings import Settings


@pytest.fixture
def watches(monkeypatch):
    """Makes the watches of process 0 and of two others, connected, and queues of those that they say are gone."""
    monkeypatch.setattr(peers, "_BEAT", 0.05)
    monkeypatch.setattr(peers, "_SILENCE", 0.5)
    monkeypatch.setattr(peers, "_OWN_ERROR", 0.1)
    pairs = [socket.socketpair() for _ in range(2)]
    ends = [{1: pairs[0][0], 2: pairs[1][0]}, {0: pairs[0][1]}, {0: pairs[1][1]}]
    made, said = [], [queue.Queue() for _ in ends]
    for connections, gone in zip(ends, said, strict=True):
        monkeypatch.setattr(peers, "_star", lambda connections=connections: connections)
        made.append(peers._Watch(gone.put))
    yield made, ends, said
    for watch in made:
        watch.close(peers._BYE)


def test_a_process_that_dies_is_named_by_all_others(watches):
    _made, ends, said = watches
    ends[2][0].shutdown(socket.SHUT_RDWR)  # as the system does with the connections of a dead process
    assert said[0].get(timeout=5) == 2
    assert said[1].get(timeout=5) == 2


def test_a_process_that_is_silent_is_named(watches):
    made, _ends, said = watches
    made[1]._ending.set()  # it beats no more, like a process that was stopped
    assert said[0].get(timeout=5) == 1
    assert said[2].get(timeout=5) == 1


def test_a_process_that_ends_as_it_should_is_not(watches):
    made, _ends, said = watches
    made[1].close(peers._BYE)
    with pytest.raises(queue.Empty):
        said[0].get(timeout=1)
    made[2].close(peers._FAILED)
    assert said[0].get(timeout=5) == 2


def test_settings_on_which_processes_disagree_are_named(monkeypatch):
    vectors = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: vectors.append(own) or own[None])

    def both(*others):
        """What process 0 says, where process 1 has the other arguments."""
        agreement.check_agreement(*others)
        with monkeypatch.context() as patched:
            patched.setattr(multihost_utils, "process_allgather", lambda own: np.stack([own, vectors[-1]]))
            agreement.check_agreement(Settings(), "config", {"corpus": "abc"})

    both(Settings(corpus=("elsewhere",)), "config", {"corpus": "abc"})  # the same text in another place
    with pytest.raises(ValueError, match="disagree on lr: process 1 and process 0 have different values; start all"):
        both(Settings(lr=0.5), "config", {"corpus": "abc"})
    with pytest.raises(ValueError, match="disagree on the model's config, the text or the tokenizer: process 1"):
        both(Settings(), "other", {"corpus": "abd"})
