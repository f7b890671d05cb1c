"""Every table there is: importing this module fills ``Base.metadata``."""

from cloud_coordinator.compression import tables as compression
from cloud_coordinator.database import Base
from cloud_coordinator.devices import tables as devices
from cloud_coordinator.models import tables as models
from cloud_coordinator.rollouts import tables as rollouts
from cloud_coordinator.runs import tables as runs
from cloud_coordinator.trust import tables as trust

MODULES = (compression, devices, models, rollouts, runs, trust)
METADATA = Base.metadata
