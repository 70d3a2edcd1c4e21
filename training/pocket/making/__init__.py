"""How the embedded base model, its ControlNets and its judge are made. Using them needs none of this."""
