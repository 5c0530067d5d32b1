"""Memory and communication of a run, before anything is downloaded or started: `rlhf plan`.

`docs/planning.md` says what is counted, what is not, and how near to measured peaks it comes.
"""

from rlhf_lightning.planning.plan import Plan as Plan
from rlhf_lightning.planning.plan import plan as plan
from rlhf_lightning.planning.request import Request as Request
