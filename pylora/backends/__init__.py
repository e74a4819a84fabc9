"""The backends behind `pylora.dispatch`, fastest first for each device."""
