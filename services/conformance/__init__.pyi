from .local import check_environment as check_environment
