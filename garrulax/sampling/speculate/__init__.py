"""Speculation: tokens are guessed, and the model reads several guesses in one pass (docs/speculation.md).

A way of speculation (`Speculation`) gives, for one model and the requests of a call, a `Proposer`: pure functions that
propose a tree of drafts. `verify` reads them, and `accept` decides which of them are kept.
"""

from garrulax.sampling.speculate.draft import Draft, draft
from garrulax.sampling.speculate.interface import Bound, Outcome, Proposal, Proposer, Speculation, depths
from garrulax.sampling.speculate.lookup import PromptLookup, prompt_lookup
from garrulax.sampling.speculate.medusa import Medusa, medusa
from garrulax.sampling.speculate.running import (
    check_acceptance,
    check_speculation,
    compile_speculation,
    decode_speculating,
)

__all__ = [
    "Bound",
    "Draft",
    "Medusa",
    "Outcome",
    "PromptLookup",
    "Proposal",
    "Proposer",
    "Speculation",
    "check_acceptance",
    "check_speculation",
    "compile_speculation",
    "decode_speculating",
    "depths",
    "draft",
    "medusa",
    "prompt_lookup",
]
