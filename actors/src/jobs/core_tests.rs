//! Jobs by events and commands.

use super::core::{Command, End, ErrorType, JobsState, Limits, ProcessId, Refused, Status};
use super::request::Submission;

const KEEPER: ProcessId = ProcessId { pid: 7, start_time: 1 };

fn state(running_max: usize) -> JobsState {
    JobsState::new(Limits { running_max, queued_max: 2, kept_max: 2, millicpus: 2000 }, Vec::new())
}

fn job(millicpus: u64) -> Submission {
    Submission { millicpus, ..Submission::of("true") }
}

fn save(id: &str) -> Command {
    Command::Save(id.into())
}

fn start(id: &str) -> Command {
    Command::Start(id.into())
}

#[test]
fn a_job_runs_and_succeeds() {
    let mut jobs = state(1);
    assert_eq!(jobs.submit("a", job(0), 5), Ok(vec![save("a"), start("a")]));
    assert_eq!(jobs.get("a").map(|job| job.status), Some(Status::Pending));
    assert_eq!(jobs.started("a", KEEPER), [save("a")]);
    assert_eq!(jobs.get("a").map(|job| job.status), Some(Status::Running));
    assert_eq!(jobs.ended("a", End::Exited { code: 0 }, "", 9), [save("a")]);
    let job = jobs.get("a").expect("kept");
    assert_eq!((job.status, job.exit_code, job.end_time), (Status::Succeeded, Some(0), Some(9)));
    assert_eq!(jobs.submit("a", super::request::Submission::of("true"), 9), Err(Refused::Exists("a".into())));
}

#[test]
fn a_failure_names_code_and_log() {
    let mut jobs = state(2);
    for (id, tail) in [("a", "boom\n"), ("b", "")] {
        jobs.submit(id, job(0), 0).expect("taken");
        jobs.started(id, KEEPER);
        jobs.ended(id, End::Exited { code: 3 }, tail, 1);
    }
    let message = |id| jobs.get(id).and_then(|job| job.message.clone()).expect("a message");
    assert_eq!(
        message("a"),
        "Job entrypoint command failed with exit code 3, last available logs (truncated to 20,000 chars):\nboom\n"
    );
    assert_eq!(message("b"), "Job entrypoint command failed with exit code 3. No logs available.");
    assert_eq!(jobs.get("a").and_then(|job| job.error_type), Some(ErrorType::JobEntrypointCommandError));
}

#[test]
fn what_does_not_fit_waits_in_order_and_the_queue_is_bounded() {
    let mut jobs = state(3);
    jobs.submit("a", job(1500), 0).expect("taken");
    assert_eq!(jobs.submit("b", job(1000), 0), Ok(vec![save("b")]), "no CPU is left for it");
    assert_eq!(jobs.submit("c", job(0), 0), Ok(vec![save("c")]), "it does not overtake b");
    assert_eq!(jobs.submit("d", job(0), 0), Err(Refused::QueueFull(2)));
    assert!(matches!(jobs.submit("e", job(2001), 0), Err(Refused::TooLarge { .. })));
    jobs.started("a", KEEPER);
    assert_eq!(jobs.ended("a", End::Exited { code: 0 }, "", 1), [save("a"), start("b"), start("c")]);
}

#[test]
fn a_stop_reaches_a_job_in_every_state() {
    let mut jobs = state(1);
    jobs.submit("running", job(0), 0).expect("taken");
    jobs.submit("queued", job(0), 0).expect("taken");
    let (stopped, commands) = jobs.stop("queued", 1).expect("there");
    assert_eq!((stopped, commands), (true, vec![save("queued")]));
    assert_eq!(jobs.get("queued").map(|job| job.status), Some(Status::Stopped));
    // While it is being started the stop waits for the keeper.
    assert_eq!(jobs.stop("running", 1), Ok((true, vec![save("running")])));
    assert_eq!(jobs.started("running", KEEPER), [save("running"), Command::Stop("running".into())]);
    jobs.ended("running", End::Exited { code: -15 }, "", 2);
    let job = jobs.get("running").expect("kept");
    assert_eq!((job.status, job.error_type, job.exit_code), (Status::Stopped, None, None));
    assert_eq!(jobs.stop("running", 3), Ok((false, vec![])));
    assert_eq!(jobs.stop("none", 3), Err(Refused::NoSuchJob("none".into())));
}

#[test]
fn only_ended_jobs_are_deleted_and_the_oldest_is_forgotten() {
    let mut jobs = state(1);
    jobs.submit("a", job(0), 0).expect("taken");
    assert!(matches!(jobs.delete("a"), Err(Refused::NotEnded { .. })));
    for id in ["a", "b", "c"] {
        if id != "a" {
            jobs.submit(id, job(0), 0).expect("taken");
        }
        jobs.started(id, KEEPER);
        let commands = jobs.ended(id, End::Exited { code: 0 }, "", 1);
        assert_eq!(commands.contains(&Command::Forget("a".into())), id == "c", "{id}");
    }
    assert_eq!(jobs.delete("b"), Ok(vec![Command::Forget("b".into())]));
    assert_eq!(jobs.list().len(), 1);
}

#[test]
fn a_restart_goes_on_with_what_was_kept() {
    let mut before = state(1);
    before.submit("a", job(0), 0).expect("taken");
    before.started("a", KEEPER);
    before.submit("b", job(0), 0).expect("taken");
    before.stop("a", 1).expect("there");
    let kept = before.list().into_iter().cloned().collect();
    let mut after = JobsState::new(Limits { running_max: 1, queued_max: 2, kept_max: 2, millicpus: 1 }, kept);
    assert_eq!(after.recovered(), [Command::Stop("a".into())], "b waits for a's place");
    assert_eq!(after.ended("a", End::Terminated, "", 2), [save("a"), start("b")]);
    assert_eq!(after.get("a").map(|job| job.status), Some(Status::Stopped));
    assert_eq!(after.submit("c", job(0), 3), Ok(vec![save("c")]));
    assert_eq!(after.get("c").map(|job| job.number), Some(2), "numbers go on");
}

#[test]
fn a_killed_keeper_is_said_so_and_the_end_of_the_cluster_is_no_failure() {
    let mut jobs = state(3);
    for (id, end) in [("a", End::Lost), ("b", End::Terminated)] {
        jobs.submit(id, job(0), 0).expect("taken");
        jobs.started(id, KEEPER);
        jobs.ended(id, end, "", 1);
    }
    let of = |id| jobs.get(id).map(|job| (job.status, job.error_type)).expect("kept");
    assert_eq!(of("a"), (Status::Failed, Some(ErrorType::JobSupervisorActorDied)));
    assert_eq!(of("b"), (Status::Stopped, None));
}
