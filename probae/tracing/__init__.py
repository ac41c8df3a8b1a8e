"""What Pyro programs are: their sites, plates, masks and terms, found by running them."""
