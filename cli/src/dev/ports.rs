//! TCP ports of the local cluster, on 127.0.0.1.
//!
//! Invariant: a port handed out here stays reserved for as long as `Ports` lives, also while the
//! service that uses it is down. The reservation is a socket that is bound and never listens, with
//! `SO_REUSEADDR`: the service can bind and listen beside it (it sets that option too), while
//! another launcher that looks for a free port, or the kernel's choice for port 0, passes it by.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::TcpSocket;

/// Free ports are looked for from here up: below the range from which the kernel takes ports for
/// outgoing connections (32768 and up on Linux), so that a stopped cluster finds its ports again.
const FIRST_PORT: u16 = 20_000;
const PORT_COUNT: u16 = 12_000;

#[derive(Default)]
pub struct Ports {
    held: Vec<(u16, TcpSocket)>,
    next: Option<u16>,
}

impl Ports {
    /// Reserves a port that nobody uses.
    pub fn pick(&mut self) -> io::Result<u16> {
        // Launchers start at different places, so that they seldom try each other's ports.
        let seed = std::process::id().wrapping_mul(61) % u32::from(PORT_COUNT);
        let start = u16::try_from(seed).expect("less than PORT_COUNT, which is a u16");
        for _ in 0..PORT_COUNT {
            let position = self.next.unwrap_or(start);
            self.next = Some((position + 1) % PORT_COUNT);
            let port = FIRST_PORT + position;
            let socket = TcpSocket::new_v4()?;
            // Bound without SO_REUSEADDR, so that any other user of the port makes this fail.
            if socket.bind(address(port)).is_ok() {
                socket.set_reuseaddr(true)?;
                self.held.push((port, socket));
                return Ok(port);
            }
        }
        Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "no free port on 127.0.0.1",
        ))
    }

    /// Reserves this very port. Fails where somebody listens on it.
    pub fn hold(&mut self, port: u16) -> io::Result<()> {
        let socket = TcpSocket::new_v4()?;
        // Connections of a former run may linger in TIME_WAIT: they are no obstacle.
        socket.set_reuseaddr(true)?;
        socket.bind(address(port))?;
        self.held.push((port, socket));
        Ok(())
    }
}

#[cfg(test)]
impl Ports {
    /// For tests, which run side by side in one process: each takes its ports from a region of
    /// its own, so that none sees another's sockets come and go.
    pub fn apart() -> Self {
        use std::sync::atomic::{AtomicU16, Ordering};
        const REGION: u16 = 200;
        static REGIONS: AtomicU16 = AtomicU16::new(0);
        let region = REGIONS.fetch_add(1, Ordering::Relaxed);
        let start = (std::process::id() % 10_000) as u16 + region * REGION;
        Self {
            held: Vec::new(),
            next: Some(start % PORT_COUNT),
        }
    }
}

fn address(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_reserved_port_can_be_listened_on_but_not_be_picked_by_another() {
        let mut ours = Ports::apart();
        let port = ours.pick().unwrap();
        let mut theirs = Ports {
            next: Some(port - FIRST_PORT),
            ..Ports::apart()
        };
        assert_ne!(theirs.pick().unwrap(), port);
        // A service starts, dies and starts again: std sets SO_REUSEADDR, as tokio does.
        drop(TcpListener::bind(address(port)).unwrap());
        let service = TcpListener::bind(address(port)).unwrap();
        std::net::TcpStream::connect(service.local_addr().unwrap()).unwrap();
    }

    #[test]
    fn a_port_that_somebody_listens_on_is_not_held() {
        let listener = TcpListener::bind(address(0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let error = Ports::apart().hold(port).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn held_ports_serve_a_new_launcher() {
        let mut first = Ports::apart();
        let port = first.pick().unwrap();
        drop(first);
        Ports::apart().hold(port).unwrap();
    }
}
