"""What lies under a TD: the TDX module, its host, and the guest's own side of the calls between them."""
