"""The only room that joins stream, model, locate and store."""
