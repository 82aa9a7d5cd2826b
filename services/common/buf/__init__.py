"""The options that the contracts' constraints are written in (buf/validate/validate.proto).

A process can register that file once. So an installed `buf` package, such as that of protovalidate 1, is used where
there is one; else the copy that is generated here.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mulligan.common.buf.validate import validate_pb2
else:
    try:
        from buf.validate import validate_pb2
    except ImportError:
        from mulligan.common.buf.validate import validate_pb2

__all__ = ["validate_pb2"]
