"""What makes the stand-in go: none of these names is the library's."""
