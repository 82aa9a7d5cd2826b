from .client import MemoryClient as MemoryClient
from .store import Added as Added
from .store import Found as Found
from .store import Page as Page
from .store import Snapshot as Snapshot
from .store import Store as Store
from .store import StoreError as StoreError
from .store import reflection_id as reflection_id
