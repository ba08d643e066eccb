"""Hosts, the models that are converted. Each file is one kind: which modules attend over the grid, and where it is.

A new model is one `Host` in one of these files, or one that a user gives to `convert(..., host=)`.
"""

from vision_attn.hosts.host import Host
from vision_attn.hosts.selection import HOSTS, find_host, is_known

__all__ = ["HOSTS", "Host", "find_host", "is_known"]
