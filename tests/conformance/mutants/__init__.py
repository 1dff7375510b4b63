"""Plug-ins that are broken on purpose: each names the promise that it does not keep.

The sound ones are `Sound` (a torch engine), `Apart` (the same with a device memory of its own, as
an accelerator has it) and the synthetic backend; everything else is one of them with one fault.
"""

from tests.conformance.mutants import choosing, computing, ending, placing, stating
from tests.conformance.mutants.sound import MUTANTS, Apart, Sound

__all__ = ["MUTANTS", "Apart", "Sound", "choosing", "computing", "ending", "placing", "stating"]
