"""What runs say: how they ended, against which reference, in which picture. Reads runs through their folders."""
