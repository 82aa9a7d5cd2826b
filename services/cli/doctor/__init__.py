"""`mulligan doctor`: says in words what is wrong and what to do."""

from mulligan.cli.doctor.command import doctor

__all__ = ["doctor"]
