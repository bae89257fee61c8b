"""Pure policies of the controller."""
