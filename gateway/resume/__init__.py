"""Requests that outlive their gateway: what of them is in Redis, and whose they are.

A client that sends `Idempotency-Key` may ask for its request again, at any gateway, and gets what
it has not got yet. This package knows records, owners and epochs; where the sequences are it does
not know (the workers do, see `gateway.life.adoption`). Start with `claim.py`.
"""

from gateway.resume.claim import Claim, JobClaim
from gateway.resume.records import Records, Retention
from gateway.resume.saved import Answer, Ended, JobAnswer, Saved

__all__ = [
    "Answer",
    "Claim",
    "Ended",
    "JobAnswer",
    "JobClaim",
    "Records",
    "Retention",
    "Saved",
]
