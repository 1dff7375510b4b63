"""What a hostile or broken line makes of the two proofs that a sender gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transfer.layout import Epoch
from transfer.memory import MemoryWriter

if TYPE_CHECKING:
    from tests.chaos.handoffs.game import Game
    from tests.chaos.handoffs.handoff import Handoff


class Forger:
    """Damages rights and digests, and knows which digests have been seen."""

    def __init__(self, game: Game) -> None:
        self._game = game
        self._proofs: list[tuple[int, int, bytes]] = []  # handoff, prompt, digest

    def right(self, handoff: Handoff, kind: str, amount: float) -> tuple[str, Epoch, bytes]:
        """What a damaged `open` shows."""
        assert handoff.reserved is not None
        landing = handoff.reserved.landing
        landing_id, epoch, secret = landing.id, landing.epoch, landing.secret
        if kind == "truncate":
            return landing_id, epoch, secret[: int(amount * len(secret))]
        variant = int(amount * 5)
        if variant == 0:
            secret = bytes([secret[0] ^ 1]) + secret[1:]
        elif variant == 1:
            epoch = Epoch(epoch.incarnation, epoch.counter + 1)
        elif variant == 2:
            epoch = Epoch(epoch.incarnation, epoch.counter - 1)
        elif variant == 3:
            epoch = Epoch(epoch.incarnation - 1, epoch.counter)
        else:
            others = [it for it in self._game.by_landing if it != landing_id]
            landing_id = self._game.dice.choose(others or ["?"], "forged", handoff.number)
        return landing_id, epoch, secret

    def proof(self, handoff: Handoff, writer: MemoryWriter, faults: dict[str, float]) -> None:
        """Damage the digest of a commit that is about to leave."""
        true: Any = writer._digest
        proof: bytes = true.result()
        if "replay" in faults:
            proof = self._old_proof(handoff)
        if "corrupt" in faults:
            bit = int(faults["corrupt"] * len(proof) * 8)
            damaged = bytearray(proof)
            damaged[bit // 8] ^= 1 << bit % 8
            proof = bytes(damaged)
        if "truncate" in faults:
            proof = proof[: int(faults["truncate"] * len(proof))]
        if proof != true.result():
            handoff.forged = True
            true.result = lambda: proof
        else:
            if any(proof == old for number, _, old in self._proofs if number != handoff.number):
                self._game.blame(f"{handoff}: its digest is that of another landing")
            self._proofs.append((handoff.number, handoff.prompt, proof))

    def _old_proof(self, handoff: Handoff) -> bytes:
        """The digest of another landing, of the same prompt if there was one."""
        others = [it for it in self._proofs if it[0] != handoff.number]
        like = [it for it in others if it[1] == handoff.prompt]
        return (like or others or [(0, 0, bytes(16))])[-1][2]
