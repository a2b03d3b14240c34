"""The bare machine: memory, registers, call gates, trace and clock. It knows no policy and no platform."""
