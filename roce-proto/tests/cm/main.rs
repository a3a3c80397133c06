//! The communication manager from outside: agents on a simulated network with virtual time, and agents against single
//! messages made by hand.

mod world;

mod bad_requests;
mod basics;
mod golden;
mod limits;
mod lossy;
mod states;
mod wrong;
