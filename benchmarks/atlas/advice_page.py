"""stub"""
def page(t, m): return "x\n"
def picture(t): return "x\n"
