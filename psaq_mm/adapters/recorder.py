# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What hooks collect while a model runs."""
from typing import Generic, List, TypeVar

from psaq_mm.prior import AttentionRecord, BatchNormRecord

RecordT = TypeVar('RecordT')


class Recorder(Generic[RecordT]):
    """Collects what one forward pass after another leaves behind."""

    def __init__(self) -> None:
        self.records: List[RecordT] = []

    def pop_all(self) -> List[RecordT]:
        """Remove and return the records so far, in the order of the layers."""
        records, self.records = self.records, []
        return records


AttentionRecorder = Recorder[AttentionRecord]
"""Collects the attention outputs."""

BatchNormRecorder = Recorder[BatchNormRecord]
"""Collects the statistics of what goes into BatchNorm layers."""
