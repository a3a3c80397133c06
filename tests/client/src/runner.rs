//! Runs the table. After every case a bystander, a session of its own that was there before, proves that the server is
//! alive, that nothing of its device changed, and that nothing of the case is left.

use std::error::Error;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rnbd_proto::wire::Flags;

use crate::cases::{Case, Ctx, Needs};
use crate::client::Client;
use crate::opts::Opts;
use crate::outcome::Outcome;
use crate::place::Place;

/// Name of the bystander's session.
pub const BYSTANDER: &str = "bystander";
/// Name of the bystander's device.
pub const WITNESS: &str = "witness";
/// Bytes of each of the bystander's I/Os; it uses twice [`BLOCKS`] of them, written and never written again.
const BLOCK: u32 = 16 << 10;
const BLOCKS: u64 = 32;

/// How one case went.
#[derive(Debug)]
pub enum Verdict {
    /// As expected.
    Passed(Outcome),
    /// Something else, or something broke; in words.
    Failed(String),
    /// Not possible here; why.
    Skipped(String),
}

/// A session that minds its own business.
pub struct Bystander {
    client: Client,
    device: u32,
    round: u64,
}

/// Contents of block `n` in round `round`: different everywhere.
fn pattern(n: u64, round: u64) -> Vec<u8> {
    let word = |i: u64| (n << 40 | round << 20 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..u64::from(BLOCK) / 8).flat_map(|i| word(i).to_le_bytes()).collect()
}

fn sector(n: u64) -> u64 {
    n * u64::from(BLOCK / 512)
}

impl Bystander {
    /// Connects and fills its device.
    ///
    /// # Errors
    /// In words.
    pub fn new(place: &dyn Place, violations: &Arc<Mutex<Vec<String>>>) -> Result<Self, Box<dyn Error>> {
        let opts = Opts {
            timeout: place.timeout(),
            src: place.src(0),
            violations: violations.clone(),
            ..Opts::new(BYSTANDER)
        };
        let mut client = Client::connect(place.cm()?, place.dst(), opts)?;
        client.sess_info()?;
        let device = client.open(WITNESS, 1)?.device_id.get();
        let mut bystander = Self { client, device, round: 0 };
        for n in 0..2 * BLOCKS {
            bystander.write(n, 0)?;
        }
        Ok(bystander)
    }

    fn write(&mut self, n: u64, round: u64) -> Result<(), Box<dyn Error>> {
        match self.client.write(self.device, sector(n), &pattern(n, round), Flags::empty())? {
            Outcome::Ok => Ok(()),
            other => Err(format!("the bystander's write: {other}").into()),
        }
    }

    fn verify(&mut self, n: u64, round: u64) -> Result<(), Box<dyn Error>> {
        let got = self.client.read(self.device, sector(n), BLOCK)?;
        let wanted = pattern(n, round);
        match got.iter().zip(&wanted).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(at) => {
                Err(format!("the bystander's data changed: block {n} of round {round}, byte {at}").into())
            }
        }
    }

    /// Reads what it wrote last time and at the beginning, and writes anew.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&mut self) -> Result<(), Box<dyn Error>> {
        // Four blocks of each half per check keep it short; all of them come round.
        for i in 0..4 {
            let (n, lap) = ((self.round * 4 + i) % BLOCKS, (self.round * 4 + i) / BLOCKS);
            self.verify(n + BLOCKS, 0)?;
            self.verify(n, lap)?;
            self.write(n, lap + 1)?;
        }
        self.round += 1;
        if !self.client.is_up() {
            return Err(format!("the bystander's path is lost: {:?}", self.client.faults()).into());
        }
        Ok(())
    }

    /// Reads everything.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check_all(&mut self) -> Result<(), Box<dyn Error>> {
        for n in 0..BLOCKS {
            self.verify(n + BLOCKS, 0)?;
        }
        Ok(())
    }

    /// Answers heartbeats.
    pub fn pump(&mut self) {
        self.client.pump();
    }
}

/// Runs cases one after the other on one server.
pub struct Runner<'p> {
    place: &'p dyn Place,
    bystander: Bystander,
    violations: Arc<Mutex<Vec<String>>>,
}

impl<'p> Runner<'p> {
    /// Connects the bystander.
    ///
    /// # Errors
    /// In words.
    pub fn new(place: &'p dyn Place) -> Result<Self, Box<dyn Error>> {
        let violations = Arc::<Mutex<Vec<String>>>::default();
        let bystander = Bystander::new(place, &violations)?;
        Ok(Self { place, bystander, violations })
    }

    /// Runs one case, and the checks after it.
    pub fn run(&mut self, case: &Case) -> Verdict {
        if let Some(why) = self.lacks(case.needs) {
            return Verdict::Skipped(why);
        }
        let cx = Ctx {
            place: self.place,
            bystander: self.bystander.client.opts.clone(),
            witness: self.bystander.device,
            violations: self.violations.clone(),
        };
        let ran = (case.run)(&cx);
        let after = self.after();
        let violations = std::mem::take(&mut *self.violations.lock().unwrap_or_else(|e| e.into_inner()));
        match (ran, after) {
            (_, Err(e)) => Verdict::Failed(format!("afterwards: {e}")),
            (Err(e), _) => Verdict::Failed(e.to_string()),
            (Ok(_), _) if !violations.is_empty() => Verdict::Failed(violations.join("; ")),
            (Ok(outcome), _) if case.expect.contains(&outcome) => Verdict::Passed(outcome),
            (Ok(outcome), _) => {
                let wanted: Vec<_> = case.expect.iter().map(ToString::to_string).collect();
                Verdict::Failed(format!("{outcome} instead of {}", wanted.join(" or ")))
            }
        }
    }

    fn lacks(&self, needs: Needs) -> Option<String> {
        match needs {
            Needs::Addresses(n) if self.place.src_count() < n => Some(format!("needs {n} client addresses")),
            Needs::Limits if self.place.limits().is_none() => Some("needs low limits of the server".into()),
            Needs::RotatingKeys if !self.bystander.client.rotating_keys() => {
                Some("needs rotating keys".into())
            }
            Needs::Invalidation if !self.place.exact_windows() => {
                Some("needs memory windows that can be invalidated".into())
            }
            _ => None,
        }
    }

    fn after(&mut self) -> Result<(), Box<dyn Error>> {
        self.bystander.check()?;
        self.wait_baseline()
    }

    /// Only the bystander's path is left.
    fn wait_baseline(&mut self) -> Result<(), Box<dyn Error>> {
        let end = Instant::now() + self.place.timeout() + self.place.half_open();
        loop {
            let paths = self.place.paths()?;
            if paths == [BYSTANDER] {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(format!("the server still has paths of {paths:?}").into());
            }
            self.bystander.pump();
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The bystander reads all it has.
    ///
    /// # Errors
    /// What is wrong.
    pub fn finish(mut self) -> Result<(), Box<dyn Error>> {
        self.bystander.check_all()?;
        self.bystander.client.disconnect();
        Ok(())
    }
}

/// Runs the cases whose names contain `filter`, and prints a table. Returns how many failed.
///
/// # Errors
/// The bystander could not connect, or found damage at the end.
pub fn run_table(place: &dyn Place, filter: &str) -> Result<usize, Box<dyn Error>> {
    let mut runner = Runner::new(place)?;
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for case in crate::cases::all().filter(|c| c.name.contains(filter)) {
        let began = Instant::now();
        let verdict = runner.run(case);
        let ms = began.elapsed().as_millis();
        match &verdict {
            Verdict::Passed(outcome) => {
                passed += 1;
                println!("ok   {:<28} {outcome:<24} {ms:>6} ms  {}", case.name, case.what);
            }
            Verdict::Skipped(why) => {
                skipped += 1;
                println!("SKIP {:<28} {why}", case.name);
            }
            Verdict::Failed(why) => {
                failed += 1;
                println!("FAIL {:<28} {why}  ({ms} ms; {})", case.name, case.what);
            }
        }
    }
    runner.finish()?;
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if passed + failed == 0 { Err(format!("no case was run for \"{filter}\"").into()) } else { Ok(failed) }
}
