"""What a run writes down and how people look at it: run folder, trackers, progress, report, guards."""

from rft.metrics.config import GuardsConfig, TrackingConfig
from rft.metrics.log import RunLog
from rft.metrics.names import is_documented, is_documented_event
from rft.metrics.progress import Progress

__all__ = ["GuardsConfig", "Progress", "RunLog", "TrackingConfig", "is_documented", "is_documented_event"]
