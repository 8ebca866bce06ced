"""Records of a run: metrics, events and samples, trackers, progress, guards."""

from rft.metrics.log import RunLog
from rft.metrics.names import is_documented, is_documented_event
from rft.metrics.progress import Progress

__all__ = ["Progress", "RunLog", "is_documented", "is_documented_event"]
