"""The tiny study of the integration tests."""

from persona_assets_tests.integration.conftest import own_project, project

__all__ = ["own_project", "project"]
