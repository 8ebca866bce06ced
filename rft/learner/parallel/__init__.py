"""How one policy is trained by several processes: `single`, `fsdp2`, `deepspeed`."""
