"""Following the control log and changing the policy of a host."""
