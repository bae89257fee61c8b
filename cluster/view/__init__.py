"""What operators see in a terminal: pictures and traces, drawn with rich."""
