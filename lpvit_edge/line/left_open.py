"""What an earlier run left: frames that were taken and have no verdict, and the next number."""

from collections.abc import Collection

from lpvit_edge.line.capture_process import MOST_MISSED
from lpvit_edge.line.clock import Clock
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.judge import lost_frame
from lpvit_edge.line.sequence import SequenceFile
from lpvit_edge.line.settle import Settlement

_SETTLED = "settled"  # every frame up to this number has its verdict


def note_settled(journal: Journal, through: int) -> None:
    """Remember that every frame up to that number has its verdict on disk."""
    if not journal.waiting:
        journal.mark(_SETTLED, through)


def go_on(
    sequence: SequenceFile,
    journal: Journal,
    settlement: Settlement,
    clock: Clock,
    *,
    claimed: Collection[int],
    parts: bool,
) -> None:
    """Give no number twice, and tell of frames that have none of the verdicts they should have.

    Where each frame is one of `parts` it gets the safe verdict now. Those in `claimed` are still
    there and will be judged.
    """
    recorded, taken = journal.last_number(), sequence.taken
    if recorded > taken:
        sequence.reach(recorded)
        text = f"frame numbers go on from {recorded}: their file said {taken}, as after a power cut"
        settlement.event("gap", text, "warning")
    settled = journal.marked(_SETTLED)
    if settled is None and taken:
        text = f"the journal is new: whether frames 1 to {taken} have verdicts is not known"
        settlement.event("gap", text, "warning")
    begin = taken if settled is None else settled
    missing = [number for number in journal.missing(begin, taken) if number not in claimed]
    if parts:
        for number in missing[:MOST_MISSED]:
            frame = lost_frame(number, clock=clock, why="the line was down")
            settlement.expect(frame)
            settlement.settle_safe(frame, "the line was down")
    if missing:
        settlement.event(
            "gap",
            f"the line had ended without notice: {len(missing)} frames without a verdict "
            f"({missing[0]} to {missing[-1]})",
            "alarm",
        )
    journal.mark(_SETTLED, sequence.taken)
