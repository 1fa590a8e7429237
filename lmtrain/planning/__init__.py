"""What a run will take, before it is made: size, arithmetic, memory, time and energy, by formula or measured."""
