"""The backends behind `pylora.dispatch`: cuda, triton, cpu and reference."""
