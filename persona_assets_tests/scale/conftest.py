"""The tiny study of the integration tests."""

from persona_assets_tests.integration.conftest import project

__all__ = ["project"]
