"""Our numbers against recorded ones: golden folders of the official implementation."""
